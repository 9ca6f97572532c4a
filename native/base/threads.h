// Thread pool for data-parallel loops; the caller is thread 0.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dsv4 {

// RAII: this thread rounds to nearest and keeps subnormal numbers, as the threads of the pool do. A caller may have set
// another mode (torch.set_flush_denormal), and bits must not depend on the thread.
class FloatMode {
#if defined(__SSE__)
   public:
    FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~FloatMode() { _mm_setcsr(before_); }
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

   private:
    unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
   public:
    FloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}) : "memory");
    }
    ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(before_) : "memory"); }
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

   private:
    uint64_t before_;
#else
   public:
    FloatMode() {}
#endif
};

// Runs call(context, task, thread) for every task in [0, tasks), handed out in order; returns when all are done. One
// caller at a time uses the pool; a concurrent caller runs its tasks on its own thread.
void run_tasks(int64_t tasks, void (*call)(void*, int64_t, int), void* context);

int thread_count();
void set_thread_count(int count);

template <class F>
void parallel(int64_t tasks, F&& f) {
    run_tasks(tasks, [](void* context, int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); }, &f);
}

}  // namespace dsv4
