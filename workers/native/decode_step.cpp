// A decode step of all layers: one parallel region from the hidden states that go into the first
// layer to those that leave the last.
//
// It runs the phases of `decoder_layer.h` and `attention_decode.h` in the order of the calls
// per layer, so its results have the same bits. Between phases the threads only meet: nobody goes
// back to the caller, and what a thread reads next is on its way from memory while it waits.
//
// Shapes: T tokens, one of each sequence; L layers, E hidden size, Hq query heads, H kv heads,
// D head dim.

// GCC takes the undefined operands inside its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <atomic>
#include <chrono>
#include <deque>

#include "attention_decode.h"
#include "decoder_layer.h"

namespace saqqara {
namespace {

// Few rows are normalised by every thread for itself: that costs less than to meet once more.
constexpr int64_t kOwnRows = 4;

// Weights that a thread may fetch while it waits; they must not drive each other out of its L2.
constexpr int64_t kWaitBytes = 256 << 10;

// As `_Layer` in decode_step.py.
struct StepLayer {
  const Projection* projection;
  const Matrix* output;
  const Mlp* mlp;
};

// As `_Step` in decode_step.py.
struct Step {
  const StepLayer* layers;
  bf16* hidden;               // [T, E], before the first layer, then after the last
  const int64_t* positions;   // [T]
  const int64_t* slots;       // [T]
  const int64_t* refs;        // [L, T, H], where the new keys and values go, in tokens
  const int32_t* lengths;     // [L, T, H], the new tokens counted
  const int32_t* page_table;  // [slots, L, H, max_pages]
  bf16* k_pages;
  bf16* v_pages;
  bf16* queries;    // [L, T, Hq, D], receives the rotated queries; or null
  float* lse;       // [L, T, Hq], receives the normalisers of the softmax; or null
  double* seconds;  // [3] of project, attention, finish: added to; or null
  int64_t num_layers;
  int64_t rows;
  int64_t page_tokens;
  int64_t max_pages;
  int64_t threads;
  float scale;
};

using Attention = Decoding<Bf16>;

// Activations of all rows; `normed` may be a thread's own.
struct Activations {
  bf16* normed;     // [T, E]
  bf16* qkv;        // [T, (Hq + 2 H) D]
  bf16* q;          // [T, Hq, D]
  bf16* attended;   // [T, Hq, D]
  bf16* activated;  // [T, F]
};

// Adds the time since the last call to a part's seconds, in one of the threads.
class Stopwatch {
 public:
  Stopwatch(Team team, double* seconds) : seconds_(team.rank == 0 ? seconds : nullptr) {
    if (seconds_ != nullptr) last_ = now();
  }

  void lap(int part) {
    if (seconds_ == nullptr) return;
    const double time = now();
    seconds_[part] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(time).count();
  }

  double* seconds_;
  double last_ = 0.0;
};

// Where the queries of a layer go: to the caller if it wants them.
bf16* queries_of(const Step& s, int64_t layer, const Activations& x) {
  const Projection& p = *s.layers[layer].projection;
  if (s.queries == nullptr) return x.q;
  return s.queries + layer * s.rows * p.query_heads * p.head_dim;
}

DecodeArguments arguments_of(const Step& s, int64_t layer, const Activations& x) {
  const Projection& p = *s.layers[layer].projection;
  DecodeArguments a{};
  a.q = queries_of(s, layer, x);
  if (s.lse != nullptr) a.lse = s.lse + layer * s.rows * p.query_heads;
  a.out = x.attended;
  a.lengths = s.lengths + layer * s.rows * p.kv_heads;
  a.q_stride = p.query_heads * p.head_dim;
  a.num_sequences = static_cast<int>(s.rows);
  a.num_heads = static_cast<int>(p.kv_heads);
  a.group = static_cast<int>(p.query_heads / p.kv_heads);
  a.dim = static_cast<int>(p.head_dim);
  a.scale = s.scale;
  return a;
}

PagedRows<Bf16::Number> rows_of(const Step& s, int64_t layer) {
  const Projection& p = *s.layers[layer].projection;
  const int64_t entries = p.kv_heads * s.max_pages;  // of one slot and layer
  return {s.k_pages,
          s.v_pages,
          s.page_table + layer * entries,
          s.slots,
          s.lengths + layer * s.rows * p.kv_heads,
          s.rows * p.kv_heads,
          p.kv_heads,
          s.num_layers * entries,
          s.max_pages,
          s.page_tokens,
          p.head_dim};
}

// x normalised, to `x.normed`; the threads have met.
void normalize_rows(Team team, const bf16* hidden, const bf16* norm, float eps, int64_t rows,
                    int64_t dim, bf16* normed) {
  if (rows <= kOwnRows) {
    normalize(Team{0, 1}, hidden, norm, eps, rows, dim, normed);
    return;
  }
  normalize(team, hidden, norm, eps, rows, dim, normed);
  team.barrier();
}

// Queries, keys and values of one layer; the new keys and values go to their pages.
void project(Team team, const Step& s, int64_t layer, const Activations& x) {
  const Projection& p = *s.layers[layer].projection;
  const Targets to{s.positions, s.refs + layer * s.rows * p.kv_heads, queries_of(s, layer, x),
                   s.k_pages, s.v_pages};
  normalize_rows(team, s.hidden, p.norm, p.eps, s.rows, p.qkv.inputs, x.normed);
  multiply(team, p.qkv, x.normed, s.rows, first_weights(team, *s.layers[layer].output),
           to_bf16(p.qkv, nullptr, x.qkv));
  team.barrier();
  rotate(team, p, x.qkv, 0, s.rows, to);
  team.barrier();
}

// Output projection, residual, and the MLP with its norm and residual.
void finish(Team team, const Step& s, int64_t layer, const Activations& x) {
  const auto [projection, output, mlp] = s.layers[layer];
  const bool is_last = layer + 1 == s.num_layers;
  const Matrix* next = is_last ? nullptr : &s.layers[layer + 1].projection->qkv;
  multiply(team, *output, x.attended, s.rows, first_weights(team, mlp->gate_up),
           to_bf16(*output, s.hidden, s.hidden));
  team.barrier();
  normalize_rows(team, s.hidden, mlp->norm, mlp->eps, s.rows, mlp->gate_up.inputs, x.normed);
  multiply(team, mlp->gate_up, x.normed, s.rows, first_weights(team, mlp->down),
           to_gated(mlp->gate_up, x.activated));
  team.barrier();
  multiply(team, mlp->down, x.activated, s.rows,
           next == nullptr ? nullptr : first_weights(team, *next),
           to_bf16(mlp->down, s.hidden, s.hidden));
  team.barrier();
}

// Says that this thread has attended, and reads weights ahead until the others have: parts of rows
// are few where sequences are, so somebody waits.
void wait_ahead(Team team, std::atomic<int64_t>& arrived, int64_t all, const Matrix& next) {
  arrived.fetch_add(1, std::memory_order_relaxed);
  const auto [first, end] = team.share(num_panels(next));
  const int64_t bytes = (end - first) * panel_elements(next) * sizeof(bf16);
  const char* at = reinterpret_cast<const char*>(first_weights(team, next));
  const char* const stop = at + std::min(bytes, kWaitBytes);
  while (at < stop && arrived.load(std::memory_order_relaxed) < all)
    for (int i = 0; i < 8; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
}

// All layers; every thread of the team calls it.
void run_layers(Team team, const Step& s, Activations x, std::deque<Attention>& attentions,
                Attention::Memory& memory, std::atomic<int64_t>& arrived) {
  thread_local Scratch own;
  if (s.rows <= kOwnRows) x.normed = own.reserve(s.rows * s.layers[0].projection->qkv.inputs);
  Part<Bf16::Number> storage[2];
  Stopwatch watch(team, s.seconds);
  for (int64_t layer = 0; layer < s.num_layers; ++layer) {
    project(team, s, layer, x);
    watch.lap(0);
    Attention& attention = attentions[layer];
    attention.attend(team, memory, storage);
    wait_ahead(team, arrived, (layer + 1) * team.size, *s.layers[layer].output);
    team.barrier();
    attention.merge(team, memory);
    team.barrier();
    watch.lap(1);
    finish(team, s, layer, x);
    watch.lap(2);
  }
}

}  // namespace
}  // namespace saqqara

using namespace saqqara;

extern "C" {

// Up to so many rows the threads share the columns of every product, so that each part of a layer
// needs all of them; beyond, a thread does better with rows of its own.
int64_t saqqara_step_rows(int64_t threads) {
  return kSoloRows * std::max(threads - 1, int64_t{1});
}

// Feeds one token of each sequence through all layers: stores its keys and values, attends to what
// its rows keep, and leaves the hidden states after the last layer in place of those before.
void saqqara_decode_step(const Step* step) {
  thread_local Scratch scratch;
  static thread_local Attention::Memory kept;
  Attention::Memory& memory = kept;  // of the calling thread, for all
  const Projection& p = *step->layers[0].projection;
  const int64_t queries = p.query_heads * p.head_dim;
  const int64_t inner = step->layers[0].mlp->gate_up.outputs;
  const int64_t rows = step->rows;
  Activations x;
  x.normed = scratch.reserve(rows * (p.qkv.inputs + p.qkv.outputs + 2 * queries + inner));
  x.qkv = x.normed + rows * p.qkv.inputs;
  x.q = x.qkv + rows * p.qkv.outputs;
  x.attended = x.q + rows * queries;
  x.activated = x.attended + rows * queries;
  std::deque<Attention> attentions;
  for (int64_t layer = 0; layer < step->num_layers; ++layer)
    attentions.emplace_back(arguments_of(*step, layer, x), rows_of(*step, layer)).reserve(memory);
  std::atomic<int64_t> arrived{0};
#pragma omp parallel num_threads(step->threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    run_layers(team, *step, x, attentions, memory, arrived);
  }
}

}  // extern "C"
