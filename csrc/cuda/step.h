// What an optimizer's step needs on a GPU beside gradients: plain structs that host and device share.
//
// Gradients may lie elsewhere at every call, parameters and states hardly ever do: their addresses lie on the device, in
// a table that is made once. `Numbers` in it are written anew by every step.
#pragma once

#include "../common/types.h"

#include <string>
#include <vector>

namespace cwclip::cuda {

// The hyperparameters of a param group, as cwclip_kernels/backends/cuda_step.py packs them.
struct AdamWRule {
  double lr, beta1, beta2, eps, weight_decay;
  const void* lr_at;  // on the device, read instead of lr; or null
  int32_t lr_is_double, maximize, correct_bias, unused;
};
static_assert(sizeof(AdamWRule) == 64, "as packed");

// The tensors of a gradient that are stepped, laid out in memory as it is; likewise packed in Python.
struct Stepped {
  char *p, *m, *v, *w;  // w null without amsgrad
  void* t;
  int64_t rule, parameter, state, t_is_double;  // which rule; the DType of p; that of m, v and w
};
static_assert(sizeof(Stepped) == 72, "as packed");

// One for each segment of the program, so that a tile finds its addresses where it finds its gradient's.
struct alignas(16) Target {
  char *p, *m, *v, *w;
  DType parameter, state;
  int32_t gradient, unused;
};

// One for each gradient: its t, which is advanced once a step.
struct alignas(16) Clock {
  void* t;
  int32_t rule, is_double;
};

// One for each gradient: what follows from its rule and t.
struct alignas(16) Numbers {
  double decay;  // 1 - lr * weight_decay
  double size;   // lr / (1 - beta1^t) * root, where root = sqrt(1 - beta2^t)
  double eps;    // eps * root
  // 1 - beta1, of the way from the mean to the gradient; or if beta1 <= 1/2, -beta1, of the way from the gradient on: the
  // same number, but there rounding leaves the gradient itself if beta1 is 0.
  double rate;
  double beta2, second;  // second: 1 - beta2
  int64_t maximize;
};

// The table's parts. Where there is no step, all are null.
struct Steps {
  const Target* targets;
  const Clock* clocks;
  Numbers* numbers;
  const float* skip;  // on the device: unless it is 0, nothing is stepped; or null
};

// Rules travel in a kernel's parameters, by as many launches as that takes.
constexpr uint32_t kRules = 56;
struct Rules {
  AdamWRule rule[kRules];
  uint32_t first, count;  // which of all they are
};

struct Program;

// The table for one entry of `stepped` a gradient, to be brought to the device.
std::string make_step_table(const Program& program, const Stepped* stepped);

// Its parts, once it is at `table`.
Steps steps_at(const Program& program, char* table, const float* skip);

}  // namespace cwclip::cuda
