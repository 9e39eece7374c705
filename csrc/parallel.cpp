#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

namespace fastprompt {
namespace {

Pool pool;  // set once, before the first kernel runs

// Units that are still to be done, shared by the workers of one region.
class Work {
 public:
  Work(int64_t units, void (*run)(int64_t, void*), void* context) : units_(units), run_(run), context_(context) {}

  void drain() {
    try {
      for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) run_(unit, context_);
    } catch (...) {
      next_.store(units_, std::memory_order_relaxed);  // the others need not go on
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t units_;
  void (*const run_)(int64_t, void*);
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Scratch {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};

}  // namespace

void set_pool(Pool given) { pool = given; }

int num_threads() {
  uint32_t count = 1;
  return pool.num_threads && pool.num_threads(&count) == 0 ? static_cast<int>(count) : 1;
}

void for_each_unit(int64_t units, void (*run)(int64_t unit, void* context), void* context) {
  const int64_t workers = units > 1 && pool.parallel_for ? std::min<int64_t>(units, num_threads()) : 1;
  if (workers <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit, context);
    return;
  }
  Work work(units, run, context);
  // One step of the range is one worker. The pool gives all steps to one thread inside a region that is already
  // parallel.
  const RangeFunction drain = [](int64_t, int64_t, void* shared) { static_cast<Work*>(shared)->drain(); };
  if (pool.parallel_for(0, workers, 1, drain, &work) != 0) throw std::runtime_error("torch's thread pool failed");
  work.rethrow();
}

namespace {

void* room(Scratch& scratch, int64_t bytes) {
  if (bytes > scratch.bytes) {
    constexpr int64_t kLine = 64;
    const int64_t room = (std::max(bytes, 2 * scratch.bytes) + kLine - 1) / kLine * kLine;
    scratch.memory.reset();  // before the new one, so that both are never held
    scratch.bytes = 0;
    scratch.memory.reset(std::aligned_alloc(kLine, room));
    if (!scratch.memory) throw std::bad_alloc();
    scratch.bytes = room;
  }
  return scratch.memory.get();
}

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Scratch scratch;
  return room(scratch, bytes);
}

void* call_scratch(int64_t bytes) {
  static thread_local Scratch scratch;
  return room(scratch, bytes);
}

}  // namespace fastprompt
