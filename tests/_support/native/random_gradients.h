// What the stress tests of the CPU's queues share: random gradients, and threads to work on them. No torch in it.
#pragma once

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
  const int64_t sizes[] = {0, 1, 7, 8, 63, 64, 65, 1000, 32767, 32768, 32769, 200001, 300000};
  Case c;
  c.components = 1 + below(6);
  const int64_t count = below(12);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    c.grads.emplace_back(sizes[below(13)]);
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

// `running` of the `threads` that a queue was made for, one after the other if it is one.
template <class Queue>
void run(Queue& queue, int threads, int running) {
  if (running == 1) {
    for (int t = 0; t < threads; ++t) queue.work(t);
    return;
  }
  std::vector<std::thread> crew;
  for (int t = 0; t < running; ++t) crew.emplace_back([&, t] { queue.work(t); });
  for (auto& t : crew) t.join();
}

}  // namespace
