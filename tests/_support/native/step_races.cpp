// An optimizer's step on a GPU by itself, without Python: random tensors of random dtypes on random machines, call after
// call, each in one phase or in two, against a step that a child could follow. Built with CWCLIP_BLOCKS_AS_THREADS and
// sanitizers.
//
//   step_races SEED CASES
#include "../../../csrc/cuda/device.cuh"
#include "../../../csrc/cuda/launch.h"
#include "blocks.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using namespace cwclip;
using namespace cwclip::cuda;

namespace {

std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

#define REQUIRE(condition)                                                     \
  if (!(condition)) {                                                          \
    std::printf("line %d, case %ld: not %s\n", __LINE__, number, #condition); \
    std::exit(1);                                                              \
  }

// A tensor that ends with its memory, for AddressSanitizer.
struct Values {
  Values(DType type, int64_t numel, int64_t shift)
      : dtype(type), start(shift * size_of(type)), bytes(static_cast<size_t>((numel + shift) * size_of(type))) {}

  char* first() { return bytes.data() + start; }

  double get(int64_t i) const {
    const char* const at = bytes.data() + start + i * size_of(dtype);
    if (dtype == DType::f32) return load<float>(at);
    if (dtype == DType::f64) return load<double>(at);
    return dtype == DType::f16 ? float_of_f16(load<uint16_t>(at)) : float_of(static_cast<uint32_t>(load<uint16_t>(at)) << 16);
  }

  void set(int64_t i, double x) {
    char* const at = first() + i * size_of(dtype);
    const float narrow = static_cast<float>(x);
    if (dtype == DType::f32) return store(at, narrow);
    if (dtype == DType::f64) return store(at, x);
    store(at, static_cast<uint16_t>(dtype == DType::f16 ? pack_f16(narrow, 0) : pack_bf16(narrow, 0)));
  }

  bool is_near(int64_t i, double x) const {
    const double step = dtype == DType::f64 ? 1e-13 : dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 2e-3 : 1e-2;
    return std::abs(get(i) - x) <= step * (std::abs(x) + 0.1);
  }

  DType dtype;
  int64_t start;
  std::vector<char> bytes;

 private:
  template <class T>
  static T load(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <class T>
  static void store(char* at, T value) { std::memcpy(at, &value, sizeof value); }
};

struct Parameter {
  Values g, p, m, v, w;
  bool amsgrad, t_is_double;
  int64_t rule, component, numel;
  double t;
  float t_narrow;
};

Parameter random_parameter(int64_t rules, int64_t components) {
  const DType types[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
  const DType p = types[between(0, 3)];
  const bool half = size_of(p) == 2;
  const DType g = half && between(0, 1) ? DType::f32 : p, state = half && between(0, 1) ? DType::f32 : p;
  const int64_t numel = between(0, 4) == 0 ? between(0, 20000) : between(0, 40);
  const int64_t shift = between(0, 3), other = between(0, 1) == 0 ? shift : between(0, 3);
  Parameter made = {{g, numel, shift}, {p, numel, shift}, {state, numel, shift}, {state, numel, other}, {state, numel, shift},
                    between(0, 1) == 1, between(0, 1) == 1, between(0, rules - 1), between(0, components - 1), numel,
                    static_cast<double>(between(0, 5)), 0};
  made.t_narrow = static_cast<float>(made.t);
  for (int64_t i = 0; i < numel; ++i) {
    made.p.set(i, static_cast<double>(between(-1000, 1000)) / 256);
    made.m.set(i, static_cast<double>(between(-1000, 1000)) / 2560);
    made.v.set(i, static_cast<double>(between(1, 1000)) / 2560);
    made.w.set(i, static_cast<double>(between(1, 1000)) / 2560);
  }
  return made;
}

double pick(double a, double b) { return between(0, 1) == 0 ? a : b; }

void one_case(long number) {
  const int64_t components = between(1, 12), rules = between(1, 2) == 1 ? between(1, 4) : between(50, 120);
  std::vector<Parameter> all;
  for (int64_t i = between(1, 30); i > 0; --i) all.push_back(random_parameter(rules, components));
  std::vector<Piece> gradients;
  std::vector<char*> addresses;
  std::vector<Stepped> stepped;
  for (Parameter& own : all) {
    gradients.push_back({nullptr, own.numel, own.g.dtype, static_cast<int32_t>(own.component), {}});
    gradients.back().gradient = static_cast<int32_t>(gradients.size()) - 1;
    addresses.push_back(own.g.first());
    void* const t = own.t_is_double ? static_cast<void*>(&own.t) : &own.t_narrow;
    stepped.push_back({own.p.first(), own.m.first(), own.v.first(), own.amsgrad ? own.w.first() : nullptr, t, own.rule,
                       static_cast<int64_t>(own.p.dtype), static_cast<int64_t>(own.m.dtype), own.t_is_double});
  }
  std::string tables;
  Program program = make_program(gradients, static_cast<int32_t>(gradients.size()), components, tables);
  program.tables = tables.data();
  std::string table = make_step_table(program, stepped.data());
  std::vector<uint64_t> workspace(static_cast<size_t>(program.workspace_bytes + 15) / 8);
  std::vector<double> caps(static_cast<size_t>(components)), norms(caps.size()), coefs(caps.size());
  std::vector<float> rates(static_cast<size_t>(rules));

  for (int call = 0; call < 3; ++call) {
    std::vector<AdamWRule> own_rules;
    for (float& rate : rates) {
      rate = static_cast<float>(pick(0.01, 0.1));
      const bool on_device = between(0, 1) == 1;
      own_rules.push_back({on_device ? 7 : rate, pick(0.9, 0), pick(0.999, 0.5), pick(1e-8, 0.1), pick(0, 0.1),
                           on_device ? &rate : nullptr, 0, between(0, 1) == 1, between(0, 1) == 1, 0});
    }
    for (Parameter& own : all) {
      for (int64_t i = 0; i < own.numel; ++i) own.g.set(i, static_cast<double>(between(-1000, 1000)) / 256);
    }
    on_host::machine.processors = static_cast<int>(between(1, 3));
    on_host::machine.resident = static_cast<uint32_t>(between(1, 8));
    on_host::machine.seed = random_bits();
    for (double& cap : caps) cap = pick(1e9, 0.5);
    const std::vector<Parameter> before = all;
    const float skip = between(0, 4) == 0 ? 1.0f : 0.0f;

    Request request = {};
    request.kind = Kind::clip_step;
    request.order = Order::two;
    request.program = &program;
    request.addresses = addresses.data();
    request.workspace = reinterpret_cast<char*>(workspace.data());
    request.results = {nullptr, norms.data(), coefs.data(), nullptr};
    request.rule = {caps.data(), 1, nullptr, 1e-6, NonFinite::propagate, true};
    request.step = {table.data(), own_rules.data(), own_rules.size(), between(0, 1) == 1 || skip != 0 ? &skip : nullptr};
    if (between(0, 1) == 1) {
      request.kind = Kind::step;
      for (double& coef : coefs) coef = pick(1, 0.25);
    }
    REQUIRE(enqueue(request) == nullptr);

    for (size_t k = 0; k < all.size(); ++k) {
      const Parameter &now = all[k], &old = before[k];
      REQUIRE(now.g.bytes == old.g.bytes);
      if (skip != 0) {
        REQUIRE(now.p.bytes == old.p.bytes && now.m.bytes == old.m.bytes && now.v.bytes == old.v.bytes);
        REQUIRE(now.w.bytes == old.w.bytes && now.t == old.t && now.t_narrow == old.t_narrow);
        continue;
      }
      const AdamWRule& rule = own_rules[static_cast<size_t>(now.rule)];
      const double t = now.t_is_double ? now.t : static_cast<double>(now.t_narrow);
      REQUIRE(t == (now.t_is_double ? old.t : static_cast<double>(old.t_narrow)) + 1);
      const double lr = rates[static_cast<size_t>(now.rule)], coef = coefs[static_cast<size_t>(now.component)];
      const double first = rule.correct_bias ? 1 - std::pow(rule.beta1, t) : 1;
      const double second = rule.correct_bias ? 1 - std::pow(rule.beta2, t) : 1;
      if (!now.amsgrad) REQUIRE(now.w.bytes == old.w.bytes);
      for (int64_t i = 0; i < now.numel; ++i) {
        const double g = old.g.get(i) * coef * (rule.maximize ? -1 : 1);
        const double m = rule.beta1 * old.m.get(i) + (1 - rule.beta1) * g;
        const double v = rule.beta2 * old.v.get(i) + (1 - rule.beta2) * g * g;
        const double w = now.amsgrad ? std::max(old.w.get(i), v) : v;
        const double p = (1 - lr * rule.weight_decay) * old.p.get(i) -
                         lr / first * m / (std::sqrt(w / second) + rule.eps);
        REQUIRE(now.m.is_near(i, m) && now.v.is_near(i, v) && (!now.amsgrad || now.w.is_near(i, w)));
        REQUIRE(now.p.is_near(i, p));
      }
    }
    for (int64_t i = 0; i < program.partials_at / 8; ++i) REQUIRE(workspace[static_cast<size_t>(i)] == 0);
  }
}

}  // namespace

int main(int, char** arguments) {
  random_bits.seed(std::strtoull(arguments[1], nullptr, 10));
  const long cases = std::strtol(arguments[2], nullptr, 10);
  for (long number = 0; number < cases; ++number) one_case(number);
  std::printf("%ld cases\n", cases);
}
