// Random parameters through the CPU's step queue by several threads at once, against plain loops; no torch in it, so that
// it runs under sanitizers. Prints the number of cases checked; any mismatch ends it with a message and status 1.
#include "../../../csrc/cpu/step_queue.h"
#include "random_gradients.h"

#include <array>
#include <cstring>

namespace {

// Of each gradient p, m, v and w, in memory laid out like its own.
using State = std::array<std::vector<float>, 4>;

float stepped(float g, float& m, float& v, float* w, float p, const cpu::AdamW& a, float factor) {
  g = a.erases ? 0.0f : g * factor;
  m += (g - m) * static_cast<float>(1 - a.beta1);
  v = v * static_cast<float>(a.beta2) + (g * g) * static_cast<float>(1 - a.beta2);
  float second = v;
  if (w != nullptr) {
    *w = *w > v || *w != *w ? *w : v;
    second = *w;
  }
  return p * static_cast<float>(a.decay) -
         m / (std::sqrt(second) + static_cast<float>(a.eps)) * static_cast<float>(a.size);
}

void check(Case& c, std::mt19937& random) {
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  std::normal_distribution<float> normal;
  std::vector<State> states(c.grads.size());
  std::vector<cpu::StepGradient> gradients;
  std::vector<cpu::StepTarget> targets;
  for (size_t i = 0; i < c.grads.size(); ++i) {
    c.pieces[i].gradient = static_cast<int32_t>(i);
    const bool has_maximum = pick(3) == 0;
    for (auto& stream : states[i]) {
      stream.resize(c.grads[i].size());
      for (float& x : stream) x = std::fabs(normal(random));
    }
    const cpu::AdamW numbers{pick(2) ? 1.0 : -1.0, 0.99, 0.9, 0.999, 1e-3, 1e-6, false};
    const auto at = [&](int j) { return reinterpret_cast<char*>(states[i][j].data()); };
    gradients.push_back({{DType::f32, DType::f32, DType::f32}, has_maximum, false, 0});
    targets.push_back({at(0), at(1), at(2), has_maximum ? at(3) : nullptr, numbers});
  }
  const auto before = states;
  const auto grads = c.grads;
  const NonFinite policy = static_cast<NonFinite>(pick(3));
  const double cap = pick(4) == 0 ? 1e9 : pick(4) == 0 ? 0.0 : 0.5;
  const bool skips = pick(8) == 0, is_given = pick(3) == 0, zero_fill = pick(2) == 0;
  const int threads = 1 + pick(8);
  std::vector<double> caps(c.components, cap), norms(c.components), coefs(c.components), factors(c.components);
  for (double& factor : factors) factor = pick(4) == 0 ? 0.0 : 0.25;
  const cpu::Tiles tiles(c.pieces, c.components);
  const cpu::StepOrder order(tiles, c.pieces);
  const CallRule rule{caps.data(), 1, nullptr, 1e-6, policy, true};
  cpu::StepQueue queue(c.pieces, tiles, order, gradients, targets, {Order::two, rule, 1, norms.data(), coefs.data()},
                       is_given ? factors.data() : nullptr, zero_fill, skips, threads);
  run(queue, threads, 1 + pick(threads));

  for (int64_t k = 0; k < c.components && !is_given; ++k) {
    double sum = 0;
    for (const Piece& s : c.pieces) {
      if (s.component == k) for_each(s, [&](float g) { sum += static_cast<double>(g) * g; });
    }
    const double norm = std::sqrt(sum);
    if (std::isnan(norm) != std::isnan(norms[k]) || (std::isfinite(norm) && !(std::fabs(norms[k] - norm) <= 1e-6 * norm))) {
      fail("norm", norms[k], norm);
    }
  }
  for (size_t i = 0; i < c.pieces.size(); ++i) {
    if (std::memcmp(c.grads[i].data(), grads[i].data(), 4 * grads[i].size()) != 0) fail("gradient", 1, 0);
    State expected = before[i];
    const double factor = is_given ? factors[c.pieces[i].component] : coefs[c.pieces[i].component];
    cpu::AdamW numbers = targets[i].numbers;
    numbers.erases = factor == 0 && (is_given ? zero_fill : policy == NonFinite::zero);
    const float signed_factor = static_cast<float>(numbers.factor * factor);
    Piece s = c.pieces[i];
    for_each(s, [&](float& g) {
      const size_t at = &g - static_cast<float*>(s.data);
      float* const w = targets[i].w == nullptr ? nullptr : &expected[3][at];
      if (!skips) expected[0][at] = stepped(g, expected[1][at], expected[2][at], w, expected[0][at], numbers, signed_factor);
    });
    for (int stream = 0; stream < 4; ++stream) {
      for (size_t j = 0; j < expected[stream].size(); ++j) {
        const float got = states[i][stream][j], want = expected[stream][j];
        if (got != want && !(std::isnan(got) && std::isnan(want))) fail("parameter or state", got, want);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::atoi(argv[1]) : 0;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 100;
  std::mt19937 random(seed);
  for (int round = 0; round < rounds; ++round) {
    Case c = make_case(random);
    if (random() % 3 == 0) {  // one bad value somewhere
      for (auto& grad : c.grads) {
        if (!grad.empty()) {
          grad[random() % grad.size()] = random() % 2 ? INFINITY : NAN;
          break;
        }
      }
    }
    check(c, random);
  }
  std::printf("%d cases\n", rounds);
}
