// What the ranks of a tensor group do in memory that they share: meet, add up, join.
//
// The memory starts with one line per rank; then come two buffers of one slot per rank. Operation n
// works in buffer n % 2: a rank fills its slot, meets the others, and reads all slots. Whoever
// fills a slot for n + 2 has met the others at n + 1, and they had read n by then; so one meeting
// per operation is enough.

#include <omp.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace saqqara {
namespace {

// What a rank tells the others, in cache lines of its own: two, because lines are fetched in pairs.
struct alignas(128) Line {
  std::atomic<int64_t> arrived;       // operations whose slot this rank has filled
  std::atomic<int64_t> operation[2];  // what it takes operations n and n + 1 for, at n % 2
};
static_assert(std::atomic<int64_t>::is_always_lock_free, "processes share no locks");

struct Exchange {
  char* memory;
  int64_t ranks;
  int64_t rank;
  int64_t slot_bytes;
};

enum Meeting : int64_t { kMet, kLate, kMismatch };

Line& line_of(const Exchange& e, int64_t rank) { return reinterpret_cast<Line*>(e.memory)[rank]; }

char* slot_of(const Exchange& e, int64_t number, int64_t rank) {
  char* slots = e.memory + e.ranks * sizeof(Line);
  return slots + (number % 2 * e.ranks + rank) * e.slot_bytes;
}

// ---- waiting ------------------------------------------------------------------------------------

constexpr int64_t kSpins = 1000;                     // some 20 microseconds
constexpr int64_t kYieldNanoseconds = 1'000'000;     // then others on this core may run
constexpr int64_t kShortestSleep = 20'000;           // then it sleeps, a 16th of what it has waited,
constexpr int64_t kLongestSleep = 500'000;           // so it wakes late by little of the wait

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

// Passes time between two looks at another rank, ever more politely.
class Patience {
 public:
  explicit Patience(int64_t nanoseconds) : nanoseconds_(nanoseconds) {}

  // Waits a little; false if that has been going on for too long.
  bool wait() {
    if (spins_ < kSpins) {
      ++spins_;
      _mm_pause();
      return true;
    }
    if (start_ == 0) start_ = now();
    const int64_t waited = now() - start_;
    if (waited > nanoseconds_) return false;
    if (waited < kYieldNanoseconds) {
      sched_yield();
      return true;
    }
    const timespec sleep{0, std::clamp(waited / 16, kShortestSleep, kLongestSleep)};
    nanosleep(&sleep, nullptr);
    return true;
  }

 private:
  int64_t nanoseconds_;
  int64_t spins_ = 0;
  int64_t start_ = 0;
};

// ---- adding up ----------------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;           // elements that a thread adds up at a time
constexpr int64_t kElementsPerThread = 1 << 15;  // fewer are not worth another thread

template <class Type>
void add_up(const Exchange& e, int64_t number, int64_t count,
            const typename Type::Number* residual, typename Type::Number* out, int64_t threads) {
  using Number = typename Type::Number;
  const auto* first = reinterpret_cast<const Number*>(slot_of(e, number, 0));
  const int64_t stride = e.slot_bytes / static_cast<int64_t>(sizeof(Number));
  const int64_t team = std::clamp(count / kElementsPerThread, int64_t{1}, threads);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = std::min(block + kBlock, count);
    for (int64_t i = block; i < end; i += kLanes) {
      const int lanes = static_cast<int>(std::min(end - i, int64_t{kLanes}));
      __m512 sum = Type::load(first + i, lanes);
      for (int64_t rank = 1; rank < e.ranks; ++rank)
        sum = _mm512_add_ps(sum, Type::load(first + rank * stride + i, lanes));
      if (residual != nullptr) sum = _mm512_add_ps(sum, Type::load(residual + i, lanes));
      Type::store(out + i, sum, lanes);
    }
  }
}

}  // namespace
}  // namespace saqqara

using namespace saqqara;

// ---- entry points -------------------------------------------------------------------------------

extern "C" {

int64_t saqqara_exchange_header_bytes(int64_t ranks) { return ranks * sizeof(Line); }

// Says that this rank's slot for operation `number` is filled, and waits until the others' are.
// May be called again for the same operation. `operation` stands for what is done; ranks that
// disagree about it are out of step. `*who` becomes the rank that is late, or disagrees.
int64_t saqqara_exchange_meet(const Exchange* e, int64_t number, int64_t operation,
                              int64_t patience_nanoseconds, int64_t* who) {
  Line& own = line_of(*e, e->rank);
  own.operation[number % 2].store(operation, std::memory_order_relaxed);
  own.arrived.store(number + 1, std::memory_order_release);
  Patience patience(patience_nanoseconds);
  for (*who = 0; *who < e->ranks; ++*who) {
    const Line& other = line_of(*e, *who);
    while (other.arrived.load(std::memory_order_acquire) <= number)
      if (!patience.wait()) return kLate;
    if (other.operation[number % 2].load(std::memory_order_relaxed) != operation) return kMismatch;
  }
  return kMet;
}

// out = the sum over ranks, in their order, of `count` numbers in each slot, plus the residual
// where there is one, in fp32 and rounded once. Numbers are bf16, or fp32 if `wide`; out may be the
// residual.
void saqqara_exchange_sum(const Exchange* e, int64_t number, int64_t count, int64_t wide,
                          const void* residual, void* out, int64_t threads) {
  if (wide)
    add_up<Fp32>(*e, number, count, static_cast<const float*>(residual), static_cast<float*>(out),
                 threads);
  else
    add_up<Bf16>(*e, number, count, static_cast<const uint16_t*>(residual),
                 static_cast<uint16_t*>(out), threads);
}

// Joins rows: each slot has bytes [first, first + count) of its rank's shard [rows, row_bytes]; they
// go to their place in out [rows, ranks * row_bytes].
void saqqara_exchange_join(const Exchange* e, int64_t number, int64_t first, int64_t count,
                           int64_t row_bytes, char* out) {
  for (int64_t rank = 0; rank < e->ranks; ++rank) {
    const char* slot = slot_of(*e, number, rank);
    for (int64_t at = first; at < first + count;) {
      const int64_t row = at / row_bytes;
      const int64_t column = at % row_bytes;
      const int64_t part = std::min(row_bytes - column, first + count - at);
      std::memcpy(out + (row * e->ranks + rank) * row_bytes + column, slot + (at - first), part);
      at += part;
    }
  }
}

}  // extern "C"
