#include "threads.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>

namespace dsv4 {
namespace {

// Work follows work within microseconds in a decode step, and a sleeping thread takes tens of them to wake: a thread
// that waits looks for its work this long before it sleeps (or, the caller, before it lets others run).
constexpr auto LOOKING = std::chrono::microseconds(300);

// Look until done() holds or LOOKING has passed. Without the pause instruction: a hypervisor that counts pauses takes
// the processor away from a virtual machine that makes many.
template <class Done>
bool look_until(Done done) {
    for (int i = 0; i < 256; ++i)
        if (done()) return true;
    const auto end = std::chrono::steady_clock::now() + LOOKING;
    do {
        for (int i = 0; i < 256; ++i)
            if (done()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

class Pool {
   public:
    explicit Pool(int count) : count_(count) {
        try {
            for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {  // the system gives no more threads
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int count() const { return count_; }

    void run(int64_t tasks, void (*call)(void*, int64_t, int), void* context) {
        tasks_ = tasks, call_ = call, context_ = context;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(count_ - 1, std::memory_order_relaxed);
        epoch_.fetch_add(1);
        if (sleeping_.load()) epoch_.notify_all();
        take(0);
        auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
        while (!look_until(done)) std::this_thread::yield();
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

   private:
    void stop() {
        stop_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    // What a task throws (memory runs out) waits until all threads are done with what the caller owns.
    void take(int thread) try {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
            call_(context_, task, thread);
    } catch (...) {
        if (!failed_.exchange(true)) failure_ = std::current_exception();
    }

    void work(int thread) {
        for (uint32_t seen = 0;;) {
            auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
            if (!look_until(called)) {
                sleeping_.fetch_add(1);
                epoch_.wait(seen);
                sleeping_.fetch_sub(1);
                if (!called()) continue;
            }
            seen = epoch_.load();
            if (stop_) return;
            take(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int count_;
    std::vector<std::thread> workers_;
    std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleeping_{0}, busy_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false}, failed_{false};
    std::exception_ptr failure_;
    int64_t tasks_ = 0;
    void (*call_)(void*, int64_t, int) = nullptr;
    void* context_ = nullptr;
};

std::mutex in_use;
// Never destroyed: a daemon thread may still compute while the process exits.
auto& pool = *new std::unique_ptr<Pool>;
std::atomic<int> wanted{1};

// A forked child has the pool's memory without its threads: forget it there, unjoined.
void forget() {
    (void)pool.release();
    new (&in_use) std::mutex;
}
const bool watching = (pthread_atfork(nullptr, nullptr, forget), true);

}  // namespace

int thread_count() { return wanted; }

void set_thread_count(int count) { wanted = count; }

void run_tasks(int64_t tasks, void (*call)(void*, int64_t, int), void* context) {
    std::unique_lock lock(in_use, std::try_to_lock);
    if (tasks < 2 || wanted < 2 || !lock.owns_lock()) {
        for (int64_t task = 0; task < tasks; ++task) call(context, task, 0);
        return;
    }
    if (!pool || pool->count() != wanted) {
        pool.reset();
        pool = std::make_unique<Pool>(wanted);
    }
    pool->run(tasks, call, context);
}

}  // namespace dsv4
