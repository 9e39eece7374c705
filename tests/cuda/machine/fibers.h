// Threads of a block as coroutines on one thread of the host: one runs until it waits for others.
//
// The next to run is the next lane of the same warp, until a warp gets no further; then another warp, in an order drawn
// from a seed. So a program that needs an order of warps it has no right to shows wrong results for some seed.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

namespace fastprompt::cuda::host {

class Fibers {
 public:
  static constexpr int kLanes = 32;

  // Runs `body(argument)` on so many threads; true if all came to its end, else error() says why not.
  bool run(int threads, void (*body)(void*), void* argument, uint64_t seed) {
    fibers_.resize(threads);
    body_ = body;
    argument_ = argument;
    random_ = seed * 0x9e3779b97f4a7c15ull + 1;
    left_ = threads;
    idle_ = 0;
    error_.clear();
    for (Fiber& f : fibers_) {
      if (!f.stack) f.stack.reset(new char[kStack]);
      f.started = f.done = false;
    }
    left_at_.resize(threads / kLanes);
    for (int w = 0; w < warps(); ++w) left_at_[w] = w * kLanes;
    current_ = left_at_[random() % warps()];
    if (_setjmp(home_) == 0) enter();
    return error_.empty();
  }

  int current() const { return current_; }
  const std::string& error() const { return error_; }

  // Lets others run until `ready()`.
  template <class F>
  void wait_until(F ready) {
    while (!ready()) yield();
    progressed();
  }
  void progressed() { idle_ = 0; }

  // Sometimes lets another warp go first, at a point where the machine might.
  void perhaps_switch() {
    progressed();
    if (random() % 4 == 0) leave_for(other_warp(1 + random() % warps()));
  }

  [[noreturn]] void fail(const std::string& why) {
    error_ = "thread " + std::to_string(current_) + ": " + why;
    _longjmp(home_, 1);
  }

  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 32);
  }

 private:
  static constexpr int kStack = 128 << 10;

  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf where;
    bool started, done;
  };

  void yield() {
    const int threads = static_cast<int>(fibers_.size());
    if (++idle_ > 4 * threads) fail("waits for ever, as all others do or have ended");
    leave_for(idle_ % kLanes == 0 ? other_warp(1) : next_lane());
  }

  int warps() const { return static_cast<int>(fibers_.size()) / kLanes; }
  int next_lane() const { return current_ / kLanes * kLanes + (current_ + 1) % kLanes; }
  // A warp further on, at the lane where it was left.
  int other_warp(int step) {
    left_at_[current_ / kLanes] = next_lane();
    return left_at_[(current_ / kLanes + step) % warps()];
  }

  void leave_for(int next) {
    const int threads = static_cast<int>(fibers_.size());
    for (int i = 0; i < threads && fibers_[next].done; ++i) next = (next + 1) % threads;
    if (next == current_) return;
    const int from = current_;
    current_ = next;
    if (_setjmp(fibers_[from].where) == 0) enter();
  }

  // Goes on with the current thread.
  void enter() {
    Fiber& f = fibers_[current_];
    if (f.started) _longjmp(f.where, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    running() = this;
    makecontext(&f.start, &Fibers::begin, 0);
    setcontext(&f.start);
  }

  static Fibers*& running() {
    static Fibers* which = nullptr;
    return which;
  }
  static void begin() {
    Fibers& self = *running();
    self.body_(self.argument_);
    self.fibers_[self.current_].done = true;
    self.progressed();
    if (--self.left_ == 0) _longjmp(self.home_, 1);
    self.leave_for(self.next_lane());
  }

  std::vector<Fiber> fibers_;
  std::vector<int> left_at_;  // where each warp goes on
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  jmp_buf home_;
  int current_ = 0, left_ = 0, idle_ = 0;
  uint64_t random_ = 1;
  std::string error_;
};

}  // namespace fastprompt::cuda::host
