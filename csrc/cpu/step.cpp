// The CPU's functions of the Python module for an optimizer's step.
#include "../common/formula.h"
#include "call.h"
#include "step_queue.h"

#include <cmath>
#include <stdexcept>
#include <utility>

namespace cwclip::cpu {
namespace {

// What is static about the step of a bucket's parameters.
struct StepProgram {
  static constexpr const char* kCapsule = "cwclip_kernels.cpu_step_program";
  std::vector<StepGradient> gradients;
  size_t maxima;  // how many have w
  StepOrder order;
};

// A param group's hyperparameters, as Python packs them.
struct Hyperparameters {
  double lr, beta1, beta2, eps, weight_decay, maximize, correct_bias;
};

bool same_layout(const Shape& a, const Shape& b) {
  if (a.dims != b.dims) return false;
  for (int64_t d = 0; d < a.dims; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// Reads the parameters and their state from the signature of [*p, *m, *v, *w, *t], gradients from theirs.
std::vector<StepGradient> step_gradients(Bytes grads, Bytes written, Bytes rule_of) {
  std::vector<Entry> gradients;
  for (const Entry& entry : entries_of(grads)) {
    if (entry.present) gradients.push_back(entry);
  }
  const std::vector<Entry> entries = entries_of(written);
  const size_t count = gradients.size();
  if (entries.size() != 5 * count || rule_of.size != static_cast<Py_ssize_t>(count * sizeof(int64_t))) {
    throw std::runtime_error("expected p, m, v, w and t for each gradient");
  }
  std::vector<StepGradient> result;
  for (size_t i = 0; i < count; ++i) {
    const Entry &g = gradients[i], &p = entries[i], &m = entries[count + i], &v = entries[2 * count + i],
                &w = entries[3 * count + i], &t = entries[4 * count + i];
    for (const Entry* one : {&p, &m, &v, &w}) {
      if (!one->present && one == &w) continue;
      if (!one->present || !one->on_cpu || !same_layout(one->shape, g.shape)) {
        throw std::runtime_error("steps parameters and states of the gradients' device, shapes and strides only");
      }
    }
    const AdamWTypes types{p.dtype, g.dtype, m.dtype};
    if (v.dtype != m.dtype || (w.present && w.dtype != m.dtype) || !types.served()) {
      throw std::runtime_error("steps with gradients and states of the parameter's dtype or float32 only");
    }
    if (!t.present || !t.on_cpu || t.shape.dims != 0 || size_of(t.dtype) < 4) {
      throw std::runtime_error("needs each step count as one float32 or float64 on the CPU");
    }
    const int64_t rule = rule_of.as<int64_t>()[i];
    result.push_back({types, w.present, t.dtype == DType::f64, static_cast<int32_t>(rule)});
  }
  return result;
}

// The arguments that both functions begin with.
struct StepCall : Call {
  explicit StepCall(Arguments& arguments) : Call(arguments), step(arguments.capsule<StepProgram>()) {
    const size_t count = step == nullptr ? 0 : step->gradients.size(), maxima = step == nullptr ? 0 : step->maxima;
    char* const* const addresses = arguments.addresses(4 * count + maxima);
    const Bytes rules = arguments.bytes();
    const auto* const skip = arguments.pointer<const float>();
    if (arguments.failed()) return;
    skips = skip != nullptr && *skip != 0;
    const auto* const hyperparameters = rules.as<Hyperparameters>();
    const int64_t rule_count = rules.size / static_cast<Py_ssize_t>(sizeof(Hyperparameters));
    if (program->gradients != count) arguments.fail(PyExc_ValueError, "the step is of another program");
    for (const StepGradient& gradient : step->gradients) {
      if (gradient.rule < 0 || gradient.rule >= rule_count) arguments.fail(PyExc_ValueError, "rules: too few");
    }
    if (arguments.failed()) return;
    size_t maximum = 3 * count;
    for (size_t i = 0; i < count; ++i) {
      const StepGradient& gradient = step->gradients[i];
      char* const w = gradient.has_maximum ? addresses[maximum++] : nullptr;
      times.push_back(addresses[3 * count + maxima + i]);
      const double time = 1 + (gradient.time_is_double ? *reinterpret_cast<double*>(times[i])
                                                       : *reinterpret_cast<float*>(times[i]));
      targets.push_back({addresses[i], addresses[count + i], addresses[2 * count + i], w, {}});
      // Most have the same rule and time as the one before, and powers take long.
      const bool is_new = i == 0 || gradient.rule != step->gradients[i - 1].rule || time != last_time;
      targets[i].numbers = is_new ? numbers_of(hyperparameters[gradient.rule], time) : targets[i - 1].numbers;
      last_time = time;
    }
  }

  static AdamW numbers_of(const Hyperparameters& rule, double time) {
    const bool corrects = rule.correct_bias != 0;
    const double first = corrects ? 1 - std::pow(rule.beta1, time) : 1;
    const double root = corrects ? std::sqrt(1 - std::pow(rule.beta2, time)) : 1;
    return {rule.maximize != 0 ? -1.0 : 1.0, 1 - rule.lr * rule.weight_decay, rule.beta1, rule.beta2,
            rule.lr / first * root,          rule.eps * root,                 false};
  }

  // Measures, unless there are factors, and updates.
  void run(const Outcome& outcome, const double* factors, bool zero_fill) const {
    int64_t bytes = 0;
    for (const Piece& piece : pieces) bytes += 4 * piece.numel * size_of(piece.dtype);  // about as much with p, m and v
    const int threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()));
    StepQueue queue(pieces, program->tiles, step->order, step->gradients, targets, outcome, factors, zero_fill, skips,
                    threads);
    on_all_threads(bytes, [&](int thread) { queue.work(thread); });
    if (skips) return;
    for (size_t i = 0; i < times.size(); ++i) {
      if (step->gradients[i].time_is_double) {
        *reinterpret_cast<double*>(times[i]) += 1;
      } else {
        *reinterpret_cast<float*>(times[i]) += 1;
      }
    }
  }

  const StepProgram* step;
  std::vector<StepTarget> targets;
  std::vector<char*> times;
  double last_time = 0;
  bool skips = false;
};

}  // namespace

PyObject* py_step_program(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 4, "cpu_step_program(program, grads, written, rule_of)");
  const auto* const program = arguments.capsule<Program>();
  const Bytes grads = arguments.bytes(), written = arguments.bytes(), rule_of = arguments.bytes();
  if (arguments.failed()) return nullptr;
  return guarded([&]() -> PyObject* {
    std::vector<StepGradient> gradients = step_gradients(grads, written, rule_of);
    if (gradients.size() != program->gradients) throw std::runtime_error("expected the program's gradients");
    size_t maxima = 0;
    for (const StepGradient& gradient : gradients) maxima += gradient.has_maximum;
    return capsule_of(std::make_unique<StepProgram>(
        StepProgram{std::move(gradients), maxima, StepOrder(program->tiles, program->pieces)}));
  });
}

PyObject* py_clip_adamw(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 13,
                      "cpu_clip_adamw(program, addresses, step, written, rules, skip, rule, caps, caps_stride, inverse, "
                      "found_inf, norms, coefs)");
  const StepCall call(arguments);
  const auto* const rule = arguments.capsule<ClipRule>();
  const auto* const caps = arguments.pointer<const double>();
  const int64_t caps_stride = arguments.number();
  const auto* const inverse = arguments.pointer<const double>();
  arguments.pointer<float>();  // found_inf, which is known before a step
  void* const norms = arguments.pointer<void>();
  void* const coefs = arguments.pointer<void>();
  if (arguments.failed()) return nullptr;
  if (caps == nullptr || norms == nullptr || coefs == nullptr) return raise(PyExc_ValueError, "caps, norms, coefs: null");
  return without_gil([&] {
    const CallRule whole{caps, caps_stride, inverse, rule->eps, rule->nonfinite, call.program->wide};
    call.run({rule->order, whole, inverse_of_scale(whole), norms, coefs}, nullptr, false);
  });
}

PyObject* py_adamw(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 8, "cpu_adamw(program, addresses, step, written, rules, skip, factors, zero_fill)");
  const StepCall call(arguments);
  const auto* const factors = arguments.pointer<const double>();
  const bool zero_fill = arguments.flag();
  if (arguments.failed()) return nullptr;
  if (factors == nullptr) return raise(PyExc_ValueError, "factors: null");
  return without_gil([&] { call.run({}, factors, zero_fill); });
}

}  // namespace cwclip::cpu
