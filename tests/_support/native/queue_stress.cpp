// Random gradients through the CPU queue by several threads at once, against plain loops; no torch in it, so that it
// runs under sanitizers. Prints the number of cases checked; any mismatch ends it with a message and status 1.
#include "../../../csrc/cpu/queue.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

using namespace cwclip;

namespace {

struct Case {
  std::vector<std::vector<float>> grads;
  std::vector<Piece> pieces;
  int64_t components;
};

Case make_case(std::mt19937& random) {
  const auto below = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random); };
  // From nothing to several tiles of 32,768 elements, most of them small.
  const int64_t sizes[] = {0, 1, 7, 8, 63, 64, 65, 1000, 32767, 32768, 32769, 200001};
  Case c;
  c.components = 1 + below(6);
  const int64_t count = below(12);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    c.grads.emplace_back(sizes[below(12)]);
    for (float& g : c.grads.back()) g = normal(random);
  }
  for (auto& grad : c.grads) {
    const int64_t n = static_cast<int64_t>(grad.size());
    Strides strides;
    // Every fourth has gaps: two rows of the same memory, one element apart.
    if (n >= 1000 && below(4) == 0) strides = {{n / 4, 2}, {1, n / 2}};
    const int64_t numel = strides.dense() ? n : n / 4 * 2;
    c.pieces.push_back({grad.data(), numel, DType::f32, static_cast<int32_t>(below(c.components)), strides});
  }
  return c;
}

template <class Each>
void for_each(const Piece& s, const Each& each) {
  float* p = static_cast<float*>(s.data);
  for (int64_t i = 0; i < s.numel; ++i) {
    const Strides& l = s.strides;
    each(l.dense() ? p[i] : p[i % l.sizes[0] * l.steps[0] + i / l.sizes[0] * l.steps[1]]);
  }
}

void fail(const char* what, double got, double want) {
  std::printf("%s: got %.17g, want %.17g\n", what, got, want);
  std::exit(1);
}

void check(Case& c, Order order, NonFinite policy, int threads, double cap) {
  std::vector<double> sums(c.components), caps(c.components, cap), norms(c.components), coefs(c.components);
  for (const Piece& s : c.pieces) {
    for_each(s, [&](float g) {
      double& sum = sums[s.component];
      const double a = std::fabs(static_cast<double>(g));
      if (order == Order::inf) {
        if (!(sum != sum) && !(a <= sum)) sum = a;
      } else {
        sum += order == Order::two ? a * a : a;
      }
    });
  }
  const auto before = c.grads;
  const CallRule rule{caps.data(), 1, nullptr, 1e-6, policy, true};
  const cpu::Tiles tiles(c.pieces, c.components);
  cpu::ClipQueue queue(c.pieces, tiles, order, rule, norms.data(), coefs.data(), threads);
  std::vector<std::thread> crew;
  for (int t = 0; t < threads; ++t) crew.emplace_back([&, t] { queue.work(t); });
  for (auto& t : crew) t.join();

  std::vector<double> wanted(c.components);
  for (int64_t k = 0; k < c.components; ++k) {
    const double norm = order == Order::two ? std::sqrt(sums[k]) : sums[k];
    if (std::isnan(norm) != std::isnan(norms[k]) || (std::isinf(norm) && norms[k] != norm) ||
        (std::isfinite(norm) && !(std::fabs(norms[k] - norm) <= 1e-6 * norm))) {
      fail("norm", norms[k], norm);
    }
    const bool bad = !std::isfinite(norm);
    wanted[k] = bad && policy == NonFinite::skip ? 1 : bad && policy == NonFinite::zero ? 0
                : norm == 0 || norm + 1e-6 <= cap ? 1 : cap / (norms[k] + 1e-6);
    if (coefs[k] != wanted[k] && !(std::isnan(coefs[k]) && std::isnan(wanted[k]))) fail("coef", coefs[k], wanted[k]);
  }
  std::vector<std::vector<float>> expected = before;
  for (size_t i = 0; i < c.pieces.size(); ++i) {
    Piece s = c.pieces[i];
    s.data = expected[i].data();
    const double coef = wanted[s.component];
    if (coef == 1) continue;
    for_each(s, [&](float& g) { g = coef == 0 && policy == NonFinite::zero ? 0.0f : g * static_cast<float>(coef); });
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    for (size_t j = 0; j < expected[i].size(); ++j) {
      const float got = c.grads[i][j], want = expected[i][j];
      if (got != want && !(std::isnan(got) && std::isnan(want))) fail("gradient", got, want);
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
    const auto pick = [&](int n) { return static_cast<int>(random() % n); };
    if (pick(3) == 0) {  // one bad value somewhere
      for (auto& grad : c.grads) {
        if (!grad.empty()) {
          grad[random() % grad.size()] = pick(2) ? INFINITY : NAN;
          break;
        }
      }
    }
    const Order order = static_cast<Order>(pick(3));
    const NonFinite policy = static_cast<NonFinite>(pick(3));
    const double cap = pick(4) == 0 ? 1e9 : pick(4) == 0 ? 0.0 : 0.5;
    check(c, order, policy, 1 + pick(8), cap);
  }
  std::printf("%d cases\n", rounds);
}
