// What calls on a GPU work on: plain structs that host and device share, and a bucket's program.
#pragma once

#include "step.h"

#include <string>
#include <vector>

namespace cwclip::cuda {

// A tile is what a block works on at a time: one 16-byte load by each thread, eight times. A component that is one run of
// at most so many bytes is small: a tile for one warp, and a block takes several.
constexpr int64_t kTileBytes = 32 * 1024;
constexpr int64_t kSmallBytes = 4 * 1024;

// A run of elements of one gradient. The static table of tiles lies on the device, component by component, so that a
// component's partial sums lie together; those of small components come last.
struct alignas(16) Tile {
  int64_t start;       // element of the gradient, in memory order if it is dense
  int32_t count;       // elements
  int32_t segment;     // its gradient's address, by its place among those of all launches
  int32_t component;
  DType dtype;
  int32_t layout;      // where its entry is among the layouts, -1 if it is dense
  int32_t of;          // tiles that the component has
};
static_assert(sizeof(Tile) == 32, "read as two 16-byte words");

// A component's tiles.
struct Span {
  uint32_t first, count;
};

// Where the static tables lie.
struct Tables {
  const Tile* tiles;
  const Span* spans;  // [K]
  // For each segment with gaps: its first element's offset from the gradient's, dims, size and stride of each, innermost
  // first.
  const int64_t* layouts;
};

// Shared by all blocks. Zero before a call; the last block to leave sets it back to zero.
struct Counters {
  uint32_t scale_ticket;  // next place in the list to take
  uint32_t listed;        // places in the list given out
  uint32_t finished;      // components of several tiles whose norm is known and that, if clipped, are listed
  uint32_t left;          // blocks that have nothing more to do
};

// Device memory that a call leaves as it found it. Calls on one stream share it.
struct Workspace {
  Counters* counters;
  uint32_t* sum_tickets;  // one for each table of addresses: tickets drawn
  uint32_t* done;         // [K] tiles measured, of components of several
  uint32_t* list;         // [tiles]: 1 + tile to be scaled, 0 where nothing is listed (yet)
  double* partials;       // [tiles]: power sums; not zero afterwards
};

// Results, on the device.
struct Results {
  double* sums;  // [K] power sums if only they are asked for; then there are no norms and coefs
  void* norms;   // [K] float, or double if wide
  void* coefs;   // likewise; read, not written, by kernels that only scale
  uint32_t* found_inf;  // one float's bits, set to 1.0f if a component has an element that is inf or NaN; or null
};

// The tiles and gradients that one launch can reach: those whose addresses are in its parameters.
struct Range {
  uint32_t tile_begin, small_begin, tile_end;  // small tiles come last
  int32_t segment_begin, segment_end;
  uint32_t table;    // index of the ticket to draw from
  uint32_t tables;   // how many tickets there are
  uint32_t last;     // whether the last block to leave sets everything back to zero
};

// Cache policies, as PTX's createpolicy.fractional makes them for all of an access (tests/backends/test_cuda_compiles.py).
constexpr uint64_t kEvictNormal = 0x16f0000000000000, kEvictLast = 0x14f0000000000000;

struct Call {
  Tables tables;
  Workspace workspace;
  Results results;
  Range range;
  CallRule rule;
  uint64_t policy;       // of Mode::both: how long L2 keeps what is measured
  uint32_t components;   // K
  uint32_t split;        // components of several tiles
  uint32_t empty;        // components of none
  uint32_t small_begin;  // the first tile of a small component, of all ranges
  uint32_t scales;       // whether what is clipped is scaled by this call; otherwise coefficients are all, or given
};

// Addresses travel in the kernel's own parameters: no copy to the device, and safe in CUDA graphs. 4 KB of parameters
// can always be had; 32,764 bytes since CUDA 12.1.
constexpr int kFewAddresses = 464;
constexpr int kManyAddresses = 4048;

template <int kCapacity>
struct Addresses {
  void* address[kCapacity];
};
static_assert(sizeof(Call) + sizeof(Steps) + sizeof(Addresses<kFewAddresses>) <= 4096, "fits the small parameter space");
static_assert(sizeof(Call) + sizeof(Steps) + sizeof(Addresses<kManyAddresses>) <= 32764, "fits the large parameter space");

// What launches depend on, of a device.
struct Traits {
  int l2_bytes = 0;
  bool overlaps = false;  // whether a kernel may begin while the one before it ends (programmatic dependent launch)
};

// What is static about the calls with one bucket of gradients, as the host needs it.
struct Program {
  static constexpr const char* kCapsule = "cwclip_kernels.cuda_program";

  // Where things are: in the tables, which lie on the device, and in the workspace.
  int64_t spans_at, layouts_at;
  int64_t sum_tickets_at, done_at, list_at, partials_at, workspace_bytes;
  uint32_t tiles, components, split, empty, small_begin;  // see Call
  int64_t bytes;                              // of the gradients
  int32_t gradients;  // whose addresses a call brings
  bool few, gaps;     // whether kFewAddresses are enough; whether any piece has gaps
  std::vector<Range> ranges;         // one for each launch of a kernel; more than one past kManyAddresses gradients
  std::vector<int32_t> gradient_of;  // the tiles' segments; a gradient whose pieces lie apart in the order comes several times

  bool wide = false;       // norms and coefficients are float64
  char* tables = nullptr;  // on the device; see place()
  int device = 0;
  Traits traits;
};

// Cuts pieces of `gradients` gradients (whose data is not looked at) into tiles. `tables` has to be brought to the device.
Program make_program(const std::vector<Piece>& pieces, int32_t gradients, int64_t components, std::string& tables);

}  // namespace cwclip::cuda
