// Random gradients through the CPU queue by several threads at once, against plain loops; no torch in it, so that it
// runs under sanitizers. Prints the number of cases checked; any mismatch ends it with a message and status 1.
#include "random_gradients.h"

namespace {

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
  cpu::ClipQueue queue(c.pieces, tiles, {order, rule, 1, norms.data(), coefs.data()}, threads);
  run(queue, threads, threads);

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
