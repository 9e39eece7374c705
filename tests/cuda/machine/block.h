// A block of threads of the host machine: its shared memory, its barriers, copies that are under way.
#pragma once

#include <string.h>

#include <deque>
#include <map>
#include <vector>

#include "machine/fibers.h"

namespace fastprompt::cuda::host {

// When an asynchronous copy happens: at once, as late as the program allows, or either.
enum class Copies { kEager, kLazy, kRandom };

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

// An mbarrier: arrivals and bytes outstanding in the current phase.
struct Barrier {
  int arrivals, pending, bytes, phase;
  std::vector<Copy> copies;  // that have not happened yet
};

class Block {
 public:
  Fibers fibers;

  // Runs block `number` of `count`; shared memory holds NaN of every format before.
  bool run(int number, int count, int threads, int shared_bytes, void (*body)(void*), void* argument, Copies copies,
           uint64_t seed) {
    number_ = number;
    count_ = count;
    copies_ = copies;
    shared_size_ = shared_bytes;
    shared_.resize((shared_bytes + kGuard) / sizeof(Unit) + 1);
    memset(shared_.data(), 0xff, shared_.size() * sizeof(Unit));
    warps_.assign(threads / Fibers::kLanes, Meeting{});
    all_ = Meeting{};
    groups_.assign(threads, {});
    open_.assign(threads, {});
    barriers_.clear();
    const bool good = fibers.run(threads, body, argument, seed);
    error_ = fibers.error();
    for (int i = 0; good && i < kGuard; ++i)
      if (shared()[shared_bytes + i] != '\xff') error_ = "wrote behind shared memory";
    return error_.empty();
  }

  const std::string& error() const { return error_; }
  int number() const { return number_; }
  int count() const { return count_; }
  char* shared() { return reinterpret_cast<char*>(shared_.data()); }

  // All lanes of a warp come with something; the last one gets it all. `kind` names the operation, the same for all.
  template <class F>
  void meet_warp(int kind, void* mine, F together) {
    const int at = fibers.current();
    meet(warps_[at / Fibers::kLanes], kind, at % Fibers::kLanes, Fibers::kLanes, mine, together);
  }
  void meet_block() {
    meet(all_, -1, fibers.current(), static_cast<int>(groups_.size()), nullptr, [](void**) {});
    fibers.perhaps_switch();
  }

  void check_shared(const char* p, int bytes, int alignment) {
    const auto at = p - shared();
    if (at < 0 || at + bytes > shared_size_) fibers.fail("an address outside shared memory");
    if (at % alignment) fibers.fail("a misaligned address in shared memory");
  }

  // cp.async
  void copy_async(const Copy& copy) {
    check_shared(copy.to, copy.bytes, 16);
    if (reinterpret_cast<uintptr_t>(copy.from) % 16) fibers.fail("a misaligned address in memory");
    if (now())
      perform(copy);
    else
      open_[fibers.current()].push_back(copy);
  }
  void close_group() {
    auto& open = open_[fibers.current()];
    groups_[fibers.current()].push_back(open);
    open.clear();
  }
  void wait_groups(int pending) {
    auto& groups = groups_[fibers.current()];
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
      for (const Copy& copy : groups.front()) perform(copy);
    fibers.perhaps_switch();
  }

  // mbarrier and cp.async.bulk
  void barrier_init(uint64_t* at, int arrivals) {
    check_shared(reinterpret_cast<char*>(at), 8, 8);
    *at = kMark;
    barriers_[at] = {arrivals, arrivals, 0, 0, {}};
  }
  void barrier_arrive(uint64_t* at, int bytes) {
    Barrier& b = barrier(at);
    if (b.pending == 0) fibers.fail("one arrival too many at a barrier");
    b.bytes += bytes;
    --b.pending;
    complete(b);
  }
  void copy_bulk(const Copy& copy, uint64_t* at) {
    check_shared(copy.to, copy.bytes, 16);
    if (reinterpret_cast<uintptr_t>(copy.from) % 16 || copy.bytes % 16) fibers.fail("a misaligned bulk copy");
    Barrier& b = barrier(at);
    if (!now()) return b.copies.push_back(copy);
    perform(copy);
    b.bytes -= copy.bytes;
    complete(b);
  }
  void barrier_wait(uint64_t* at, int parity) {
    Barrier& b = barrier(at);
    if (b.phase % 2 == parity && b.pending == 0) {
      for (const Copy& copy : b.copies) {
        perform(copy);
        b.bytes -= copy.bytes;
      }
      b.copies.clear();
      complete(b);
    }
    fibers.wait_until([&] { return b.phase % 2 != parity; });
    fibers.perhaps_switch();
  }

 private:
  static constexpr int kGuard = 4096;
  static constexpr uint64_t kMark = 0x6d62617272696572;
  struct alignas(128) Unit {
    char bytes[128];
  };
  struct Meeting {
    int arrived = 0, kind = 0;
    uint64_t round = 0;
    void* brought[1024 / 8];
  };

  template <class F>
  void meet(Meeting& m, int kind, int who, int count, void* mine, F together) {
    if (m.arrived > 0 && m.kind != kind) fibers.fail("threads meet in different operations");
    m.kind = kind;
    m.brought[who] = mine;
    if (++m.arrived == count) {
      together(m.brought);
      m.arrived = 0;
      ++m.round;
      fibers.progressed();
      return;
    }
    const uint64_t round = m.round;
    fibers.wait_until([&] { return m.round != round; });
  }

  bool now() { return copies_ == Copies::kEager || (copies_ == Copies::kRandom && fibers.random() % 2); }
  static void perform(const Copy& copy) { memcpy(copy.to, copy.from, copy.bytes); }

  Barrier& barrier(uint64_t* at) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end() || *at != kMark) fibers.fail("a barrier that is none, or was overwritten");
    return found->second;
  }
  void complete(Barrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.arrivals;
    ++b.phase;
    fibers.progressed();
  }

  int number_ = 0, count_ = 0, shared_size_ = 0;
  Copies copies_ = Copies::kEager;
  std::vector<Unit> shared_;
  std::vector<Meeting> warps_;
  Meeting all_;
  std::vector<std::deque<std::vector<Copy>>> groups_;
  std::vector<std::vector<Copy>> open_;
  std::map<uint64_t*, Barrier> barriers_;
  std::string error_;
};

inline Block& running() {
  static Block block;
  return block;
}

}  // namespace fastprompt::cuda::host
