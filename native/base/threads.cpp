#include "base/threads.h"

#include <atomic>
#include <cassert>
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

// Time that a waiting thread spins before it sleeps (the caller: before it yields). A decode step has new work every
// few microseconds, and waking a sleeping thread takes tens of microseconds.
constexpr auto SPIN_TIME = std::chrono::microseconds(300);

using Call = void (*)(void*, int64_t, int);

// Spins until done() or SPIN_TIME; returns done(). No pause instruction: hypervisors that count pauses deschedule a
// virtual machine that executes many.
template <class Done>
bool spin_until(Done done) {
    for (int i = 0; i < 256; ++i)
        if (done()) return true;
    const auto end = std::chrono::steady_clock::now() + SPIN_TIME;
    do {
        for (int i = 0; i < 256; ++i)
            if (done()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// The calling thread and the workers claim tasks from one counter. Nobody waits for a worker that has claimed no task:
// if the system runs something else on its processor, the other threads do the work.
class Pool {
   public:
    explicit Pool(int count) : count_(count) {
        try {
            for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {  // the system has no more threads
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int count() const { return count_; }

    void run(int64_t tasks, Call call, void* context) {
        assert(tasks < int64_t{1} << 32);
        tasks_ = tasks;
        call_ = call;
        context_ = context;
        finished_.store(0, std::memory_order_relaxed);
        uint32_t round = round_.load(std::memory_order_relaxed) + 1;
        next_.store(uint64_t{round} << 32 | static_cast<uint64_t>(tasks), std::memory_order_release);
        round_.store(round);
        if (sleeping_.load()) round_.notify_all();
        run_claimed(round, 0);
        auto done = [&] { return finished_.load(std::memory_order_acquire) == tasks; };
        while (!spin_until(done)) std::this_thread::yield();
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

   private:
    void stop() {
        stop_ = true;
        round_.fetch_add(1);
        round_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    // Claims and runs tasks of a round until none is left. A round ends when all its tasks are finished, so after a
    // claim the members that run() sets belong to this round.
    void run_claimed(uint32_t round, int thread) {
        constexpr uint64_t LEFT = 0xFFFFFFFFu;
        for (uint64_t next = next_.load(std::memory_order_acquire); next >> 32 == round && (next & LEFT);) {
            if (!next_.compare_exchange_weak(next, next - 1, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            try {
                call_(context_, tasks_ - static_cast<int64_t>(next & LEFT), thread);
            } catch (...) {  // e.g. bad_alloc: rethrown once no thread uses the caller's data any more
                if (!failed_.exchange(true)) failure_ = std::current_exception();
            }
            finished_.fetch_add(1, std::memory_order_release);
            next = next_.load(std::memory_order_acquire);
        }
    }

    void work(int thread) {
        FloatMode mode;  // a new thread inherits its creator's mode
        for (uint32_t seen = 0;;) {
            auto called = [&] { return round_.load(std::memory_order_acquire) != seen; };
            if (!spin_until(called)) {
                sleeping_.fetch_add(1);
                round_.wait(seen);
                sleeping_.fetch_sub(1);
                if (!called()) continue;
            }
            seen = round_.load();
            if (stop_) return;
            run_claimed(seen, thread);
        }
    }

    const int count_;
    std::vector<std::thread> workers_;
    std::atomic<uint32_t> round_{0};
    std::atomic<uint64_t> next_{0};  // upper half: the round; lower half: number of its unclaimed tasks
    std::atomic<int64_t> finished_{0};
    int64_t tasks_ = 0;
    Call call_ = nullptr;
    void* context_ = nullptr;
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false}, failed_{false};
    std::exception_ptr failure_;
};

std::mutex in_use;
// Never destroyed: a daemon thread may still be computing while the process exits.
auto& pool = *new std::unique_ptr<Pool>;
std::atomic<int> wanted{1};

// A forked child has the pool's memory without its threads: it abandons the pool unjoined.
void abandon_pool() {
    (void)pool.release();
    new (&in_use) std::mutex;
}
const bool registered = (pthread_atfork(nullptr, nullptr, abandon_pool), true);

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
