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

#include <deque>

#include "attention_decode.h"
#include "step_layers.h"

namespace saqqara {
namespace {

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
  float softcap;
};

using Attention = Decoding<Bf16>;

// Where the queries of a layer go: to the caller if it wants them.
bf16* queries_of(const Step& s, int64_t layer, bf16* q) {
  const Projection& p = *s.layers[layer].projection;
  if (s.queries == nullptr) return q;
  return s.queries + layer * s.rows * p.query_heads * p.head_dim;
}

DecodeArguments arguments_of(const Step& s, int64_t layer, bf16* q, bf16* attended) {
  const Projection& p = *s.layers[layer].projection;
  DecodeArguments a{};
  a.q = queries_of(s, layer, q);
  if (s.lse != nullptr) a.lse = s.lse + layer * s.rows * p.query_heads;
  a.out = attended;
  a.lengths = s.lengths + layer * s.rows * p.kv_heads;
  a.q_stride = p.query_heads * p.head_dim;
  a.num_sequences = static_cast<int>(s.rows);
  a.num_heads = static_cast<int>(p.kv_heads);
  a.group = static_cast<int>(p.query_heads / p.kv_heads);
  a.dim = static_cast<int>(p.head_dim);
  a.scale = s.scale;
  a.softcap = s.softcap;
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

// All layers; every thread of the team calls it.
void run_layers(Team team, const Step& s, Activations x, bf16* q, std::deque<Attention>& attentions,
                Attention::Memory& memory, std::atomic<int64_t>& arrived) {
  x.own = own_rows(s.layers[0]);
  Part<Bf16::Number> storage[2];
  Stopwatch watch(team, s.seconds);
  for (int64_t layer = 0; layer < s.num_layers; ++layer) {
    const StepLayer& weights = s.layers[layer];
    const int64_t* refs = s.refs + layer * s.rows * weights.projection->kv_heads;
    const Targets to{s.positions, refs, queries_of(s, layer, q), s.k_pages, s.v_pages};
    project(team, weights, s.hidden, s.rows, x, to);
    watch.lap(0);
    Attention& attention = attentions[layer];
    attention.attend(team, memory, storage);
    wait_ahead(team, arrived, (layer + 1) * team.size, *weights.finish->output);
    team.barrier();
    attention.merge(team, memory);
    team.barrier();
    watch.lap(1);
    const bool is_last = layer + 1 == s.num_layers;
    finish(team, weights, is_last ? nullptr : &weights + 1, s.hidden, s.rows, x);
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
  thread_local Scratch queries;
  static thread_local Attention::Memory kept;
  Attention::Memory& memory = kept;  // of the calling thread, for all
  const Projection& p = *step->layers[0].projection;
  const Activations x =
      Activations::reserve(scratch, step->layers, step->num_layers, step->rows);
  bf16* q = queries.reserve(step->rows * p.query_heads * p.head_dim);
  std::deque<Attention> attentions;
  for (int64_t layer = 0; layer < step->num_layers; ++layer)
    attentions.emplace_back(arguments_of(*step, layer, q, x.attended), rows_of(*step, layer))
        .reserve(memory);
  std::atomic<int64_t> arrived{0};
#pragma omp parallel num_threads(step->threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    run_layers(team, *step, x, q, attentions, memory, arrived);
  }
}

}  // extern "C"
