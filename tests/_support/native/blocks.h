// Blocks of threads on a CPU: who am I, barriers, exchange of values within a warp, shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cwclip::on_host {

// Set by a test before it runs kernels.
struct Machine {
  int processors = 2;    // what the launches are planned for
  int l2_bytes = 0, driver = 13000;
  uint32_t resident = 4;  // blocks that run at a time; others begin when one of them has ended
  uint64_t seed = 0;     // of the order in which fibers take turns
  uint64_t launches = 0;  // counted here
  bool runs = true;       // whether launches do anything: not where host time is measured
  // The current stream: a handle, which may be that of an earlier one, and a number, which isn't.
  void* stream = nullptr;
  uint64_t stream_number = 0;
  bool capturing = false;
};
extern Machine machine;

// Runs `kernel` in every thread of every block, and returns when all have ended.
void run(uint32_t blocks, int threads, const std::function<void()>& kernel);

// For a thread that runs.
int thread_index();
uint32_t block_index();
uint32_t block_count();
void* shared_memory(size_t bytes);  // the block's own
void block_barrier();
void wait_while_parity(uint64_t* phase, uint32_t parity);  // until the phase's lowest bit is another
void worker_barrier(int threads);  // for the block's first `threads`
void warp_barrier(int lanes);
// The value that thread `source` of this warp passes. All of a warp's lanes take part.
uint64_t exchange(uint64_t value, int source, int lanes);
// 16 bytes from `from` to `to`, at once or only with this thread's finish_copies(), as the seed has it.
void copy_async(void* to, const void* from);
void finish_copies();
void maybe_switch();  // another thread's turn, now and then
void pause();         // another thread's turn

}  // namespace cwclip::on_host
