// Checks of the exponentials and logarithms of csrc/cpu/vec.h; the exit status says whether they hold.

#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "cpu/vec.h"

namespace {

using namespace fastprompt::FASTPROMPT_ISA;

constexpr double kStep = 0x1p-23;  // from 1 to the next number

// The largest relative error over numbers from `first` to `last`, both included.
template <class F, class Exact>
double worst(float first, float last, F f, Exact exact) {
  constexpr int kSteps = 1 << 20;
  double error = 0;
  for (int i = 0; i <= kSteps; ++i) {
    const float x = first + (last - first) * static_cast<float>(i) / kSteps;
    const double want = exact(static_cast<double>(x)), got = f(splat(x))[0];
    const double off = got == want ? 0 : std::abs(got / want - 1);
    if (!(off <= error)) error = off;
  }
  return error;
}

int failed = 0;

void expect(bool holds, const char* what, double found) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s: %g\n", what, found);
  failed = 1;
}

}  // namespace

int main() {
  const auto exact = [](double x) { return std::exp2(x); };
  const double sharp = worst(-120, 0, [](vf x) { return fastprompt::FASTPROMPT_ISA::exp2<6>(x); }, exact);
  expect(sharp <= 1.6e-8 + kStep, "2^x by degree 6", sharp);
  const double coarse = worst(-120, 0, [](vf x) { return fastprompt::FASTPROMPT_ISA::exp2<4>(x); }, exact);
  expect(coarse <= 2.7e-6 + kStep, "2^x by degree 4", coarse);
  const double log =
      worst(0, 1, [](vf x) { return fastprompt::FASTPROMPT_ISA::log1p(x); }, [](double x) { return std::log1p(x); });
  expect(log <= 8e-9 + 3 * kStep, "log of 1 + x", log);

  for (const float x : {-INFINITY, -1000.0f}) {
    const float zero = fastprompt::FASTPROMPT_ISA::exp2<6>(splat(x))[0];
    expect(zero == 0, "2^x of what lies far below", zero);
  }
  const float nan = fastprompt::FASTPROMPT_ISA::exp2<6>(splat(NAN))[0];
  expect(nan != nan, "2^NaN", nan);
  return failed;
}
