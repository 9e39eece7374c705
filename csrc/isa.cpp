#include "isa.h"

#include <atomic>

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastprompt {

#define FASTPROMPT_DECLARE(name, Call) void name(const Call& call);
#define FASTPROMPT_TABLE(isa)                                   \
  namespace isa {                                               \
  FASTPROMPT_KERNELS(FASTPROMPT_DECLARE)                        \
  namespace {                                                   \
  constexpr Kernels table{FASTPROMPT_KERNELS(FASTPROMPT_NAME)}; \
  }                                                             \
  }
#define FASTPROMPT_NAME(name, Call) &name,

FASTPROMPT_TABLE(portable)
#if defined(__x86_64__)
#if !defined(FASTPROMPT_WITHOUT_AVX2)
FASTPROMPT_TABLE(avx2)
#endif
FASTPROMPT_TABLE(avx512)
FASTPROMPT_TABLE(avx512_bf16)
#endif

namespace {

bool processor_has(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // older compilers do not know its name below
  const bool avx2 = halves && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(FASTPROMPT_WITHOUT_AVX2)
  if (isa == Isa::avx2) return false;
#endif
  if (isa == Isa::avx2 || !avx2) return avx2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 && (isa == Isa::avx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

Isa best() {
  int isa = kIsas - 1;
  while (!processor_has(static_cast<Isa>(isa))) --isa;
  return static_cast<Isa>(isa);
}

std::atomic<Isa> in_use{best()};

}  // namespace

const char* name_of(Isa isa) {
  static constexpr const char* kNames[kIsas] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

bool can_run(Isa isa) { return processor_has(isa); }

Isa isa_in_use() { return in_use.load(std::memory_order_relaxed); }

void use_isa(Isa isa) { in_use.store(isa, std::memory_order_relaxed); }

const Kernels& kernels() {
  switch (isa_in_use()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
      return avx512_bf16::table;
    case Isa::avx512:
      return avx512::table;
#if !defined(FASTPROMPT_WITHOUT_AVX2)
    case Isa::avx2:
      return avx2::table;
#endif
#endif
    default:
      return portable::table;
  }
}

}  // namespace fastprompt
