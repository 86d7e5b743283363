// Which instruction set's kernels run: the widest that this processor has.
//
// The results are the same bits in all of them: lanes and the order of additions are fixed by the code, and products
// are never fused with sums (-ffp-contract=off).
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace cwclip::cpu {
namespace {

const Kernels* choose() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  // For the tests: "baseline" or "avx2" on a machine that has more.
  const char* only = std::getenv("CWCLIP_CPU_ISA");
  const auto is = [&](const char* name) { return only != nullptr && std::strcmp(only, name) == 0; };
  const bool limited = is("baseline") || is("avx2");
  const auto allowed = [&](const char* name) { return !limited || is(name); };
  if (allowed("avx512") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512::kernels;
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return avx2::kernels;
#endif
  return baseline::kernels;
}

const Kernels& kernels_of(DType dtype) {
  static const Kernels* const chosen = choose();
  return chosen[static_cast<int>(dtype)];
}

}  // namespace

double power_sum(const void* data, int64_t n, DType dtype, Order order) {
  return kernels_of(dtype).power_sum(static_cast<const char*>(data), n, order);
}

void scale(void* data, int64_t n, DType dtype, double coef) {
  kernels_of(dtype).scale(static_cast<char*>(data), n, coef);
}

void adamw(const AdamWRun& run, int64_t n, const AdamWTypes& types, const AdamW& numbers) {
  kernels_of(types.parameter)
      .adamw[types.gradient != types.parameter][types.state != types.parameter](run, n, numbers);
}

}  // namespace cwclip::cpu
