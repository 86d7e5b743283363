// All threads of all resident blocks as fibers of one host thread. Which one goes on is random where they meet, and at
// every access to what blocks share, from a seed: a run can be repeated.
#include "blocks.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

namespace cwclip::on_host {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 4096;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block;

struct Fiber {
  jmp_buf context;
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  int thread = 0;
  bool ended = false;
  const Barrier* waits_at = nullptr;  // until its generation is another than this
  uint64_t generation = 0;
  const uint64_t* phase = nullptr;  // waits until its lowest bit isn't parity
  uint64_t parity = 0;
  uint64_t passed = 0;  // to the other lanes of its warp
  uint32_t rests = 0;   // for so many rounds, while others go on
  std::vector<std::pair<void*, const void*>> copies;  // that haven't arrived
};

struct Block {
  uint32_t index = 0;
  Barrier barrier, workers;
  std::vector<Barrier> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int running = 0;
  alignas(16) char shared[kSharedBytes];
};

struct Run {
  uint32_t blocks = 0;
  int threads = 0;
  const std::function<void()>* kernel = nullptr;
};

jmp_buf scheduler;
Fiber* current = nullptr;
Run now;
uint64_t random_state = 1;

uint32_t random_below(uint32_t limit) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((random_state >> 33) % limit);
}

void yield() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void wait_at(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_at = &barrier;
  current->generation = barrier.generation;
  yield();
  current->waits_at = nullptr;
}

bool waits(const Fiber& fiber) {
  return (fiber.waits_at != nullptr && fiber.waits_at->generation == fiber.generation) ||
         (fiber.phase != nullptr && (*fiber.phase & 1) == fiber.parity);
}

void enter() {
  (*now.kernel)();
  current->ended = true;
  yield();
}

// A block's memory is used again: one allocation of stacks a launch is all.
void begin(Block& block, uint32_t index) {
  block.index = index;
  block.barrier = block.workers = {};
  block.warps.assign(static_cast<size_t>(now.threads), {});
  block.running = now.threads;
  for (size_t i = 0; i < kSharedBytes; ++i) block.shared[i] = static_cast<char>(random_below(256));
  block.fibers.resize(static_cast<size_t>(now.threads));
  for (int t = 0; t < now.threads; ++t) {
    auto& fiber = block.fibers[static_cast<size_t>(t)];
    if (fiber == nullptr) fiber = std::make_unique<Fiber>();
    fiber->block = &block;
    fiber->thread = t;
    fiber->begun = fiber->ended = false;
    fiber->waits_at = nullptr;
    fiber->phase = nullptr;
    fiber->rests = 0;
    fiber->copies.clear();
  }
}

// A turn for a fiber, up to its next yield(). A jump costs nanoseconds; a context, which a fiber's stack begins with, costs
// two system calls.
void take_turn(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.context, 1);
  fiber.begun = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

// Every fiber of the block that can go on, goes on once, but for some that rest, so that others get a job or two ahead of
// them. Whether there was any.
bool step(Block& block) {
  bool any = false;
  const size_t count = block.fibers.size(), start = random_below(static_cast<uint32_t>(count));
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *block.fibers[(start + i) % count];
    if (fiber.ended || waits(fiber)) continue;
    any = true;
    if (fiber.rests > 0 || random_below(256) == 0) {
      fiber.rests = fiber.rests > 0 ? fiber.rests - 1 : random_below(64);
      continue;
    }
    take_turn(fiber);
    if (fiber.ended) --block.running;
  }
  return any;
}

}  // namespace

void run(uint32_t blocks, int threads, const std::function<void()>& kernel) {
  static std::deque<std::unique_ptr<Block>> pool;  // kept: stacks are large
  ++machine.launches;
  now = {blocks, threads, &kernel};
  random_state = machine.seed * 2 + machine.launches;
  std::deque<std::unique_ptr<Block>> resident;
  uint32_t begun = 0;
  while (begun < blocks || !resident.empty()) {
    while (begun < blocks && resident.size() < machine.resident) {
      if (pool.empty()) pool.push_back(std::make_unique<Block>());
      resident.push_back(std::move(pool.front()));
      pool.pop_front();
      begin(*resident.back(), begun++);
    }
    const size_t which = random_below(static_cast<uint32_t>(resident.size()));
    if (!step(*resident[which])) {
      std::fprintf(stderr, "block %u: its threads wait at different barriers\n", resident[which]->index);
      std::abort();
    }
    if (resident[which]->running == 0) {
      pool.push_back(std::move(resident[which]));
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
}

int thread_index() { return current->thread; }
uint32_t block_index() { return current->block->index; }
uint32_t block_count() { return now.blocks; }

void* shared_memory(size_t bytes) {
  if (bytes > kSharedBytes) std::abort();
  return current->block->shared;
}

void block_barrier() { wait_at(current->block->barrier, now.threads); }

void wait_while_parity(uint64_t* phase, uint32_t parity) {
  current->phase = phase;
  current->parity = parity;
  if (waits(*current)) yield();
  current->phase = nullptr;
}

void worker_barrier(int threads) { wait_at(current->block->workers, threads); }

void warp_barrier(int lanes) { wait_at(current->block->warps[static_cast<size_t>(current->thread / lanes)], lanes); }

uint64_t exchange(uint64_t value, int source, int lanes) {
  current->passed = value;
  warp_barrier(lanes);
  const uint64_t result = current->block->fibers[static_cast<size_t>(source)]->passed;
  warp_barrier(lanes);
  return result;
}

void copy_async(void* to, const void* from) {
  if (random_below(2) == 0) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0x5a, 16);
    current->copies.emplace_back(to, from);
  }
}

void finish_copies() {
  for (const auto& [to, from] : current->copies) std::memcpy(to, from, 16);
  current->copies.clear();
}

void maybe_switch() {
  if (random_below(4) == 0) yield();
}

void pause() { yield(); }

}  // namespace cwclip::on_host
