// Every thread of a resident block as a host thread, for ThreadSanitizer. Warps have one lane here, so that what is left to
// judge is what a block's two roles and the blocks among themselves hand each other.
#include "blocks.h"

#include <atomic>
#include <barrier>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace cwclip::on_host {

Machine machine;

namespace {

struct Block {
  explicit Block(int threads) : barrier(threads) {}
  std::barrier<> barrier;
  uint32_t index = 0;
  alignas(16) char shared[4096];
};

thread_local Block* own = nullptr;
thread_local int own_thread = 0;
thread_local uint32_t chance = 1;
uint32_t blocks_now = 0;

}  // namespace

void run(uint32_t blocks, int threads, const std::function<void()>& kernel) {
  ++machine.launches;
  blocks_now = blocks;
  std::atomic<uint32_t> next{0};
  const uint32_t places = blocks < machine.resident ? blocks : machine.resident;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::thread> all;
  for (uint32_t place = 0; place < places; ++place) {
    Block* const block = resident.emplace_back(std::make_unique<Block>(threads)).get();
    for (int t = 0; t < threads; ++t) {
      all.emplace_back([&, block, place, t] {
        own = block;
        own_thread = t;
        chance = static_cast<uint32_t>(machine.seed + machine.launches * 977 + place * 131 + static_cast<uint32_t>(t));
        for (;;) {  // one block after another
          if (t == 0) block->index = next.fetch_add(1);
          block->barrier.arrive_and_wait();
          if (block->index >= blocks) return;
          kernel();
          block->barrier.arrive_and_wait();
        }
      });
    }
  }
  for (std::thread& thread : all) thread.join();
}

int thread_index() { return own_thread; }
uint32_t block_index() { return own->index; }
uint32_t block_count() { return blocks_now; }

void* shared_memory(size_t bytes) {
  if (bytes > sizeof own->shared) std::abort();
  return own->shared;
}

void block_barrier() { own->barrier.arrive_and_wait(); }
void wait_while_parity(uint64_t* phase, uint32_t parity) {
  while ((std::atomic_ref<uint64_t>(*phase).load(std::memory_order_acquire) & 1) == parity) std::this_thread::yield();
}
void worker_barrier(int) {}  // one worker
void warp_barrier(int) {}
uint64_t exchange(uint64_t value, int, int) { return value; }

void copy_async(void* to, const void* from) { std::memcpy(to, from, 16); }
void finish_copies() {}

void maybe_switch() {
  chance = chance * 1664525u + 1013904223u;
  if (chance >> 29 == 0) std::this_thread::yield();
}

void pause() { std::this_thread::yield(); }

}  // namespace cwclip::on_host
