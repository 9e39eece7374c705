// Work shared among the threads of a pool that someone else owns (torch's), so that no second pool fights for the
// cores.
#pragma once

#include <cstdint>

namespace fastprompt {

// The C functions that libtorch_cpu exports since torch 2.10; without them everything runs on the calling thread.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
  int (*parallel_for)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context) = nullptr;
  int (*num_threads)(uint32_t* out) = nullptr;
};

void set_pool(Pool pool);
int num_threads();

// Calls run(unit, context) once for each of `units`, handed out one by one to whichever thread is free.
void for_each_unit(int64_t units, void (*run)(int64_t unit, void* context), void* context);

template <class F>
void for_each_unit(int64_t units, F&& f) {
  for_each_unit(
      units, [](int64_t unit, void* context) { (*static_cast<F*>(context))(unit); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Memory of the calling thread, kept between calls and aligned to a cache line; what it held before is gone.
// It belongs to the unit that is running: a second call in the same unit gives the same memory.
void* thread_scratch(int64_t bytes);

// The same for a kernel as a whole: memory of the thread that called it, apart from what its units get.
void* call_scratch(int64_t bytes);

}  // namespace fastprompt
