// Short prompts through several layers: one parallel region from the hidden states that go into the
// first of them to those that leave the last.
//
// Prompts may begin with tokens whose keys and values are in pages; these are not computed.
//
// It runs the phases of `decoder_layer.h` and the tiles of `attention_prefill.h` in the order of the
// calls per layer, so its results have the same bits.
//
// Shapes: T packed tokens of N prompts, R of them that are wanted; L layers, E hidden size, Hq query
// heads, H kv heads, D head dim.

// GCC takes the undefined operands inside its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <deque>

#include "attention_prefill.h"
#include "step_layers.h"

namespace saqqara {
namespace {

// As `_Step` in prefill_step.py.
struct Step {
  const StepLayer* layers;
  bf16* hidden;              // [T, E], before the first layer, then after the last
  const int64_t* positions;  // [T]
  const int32_t* cu;         // [N + 1], where prompts begin
  const int64_t* refs;       // [L, T, H], where keys and values go in the pages, or -1; or null
  bf16* k_pages;             // null where neither `refs` nor `cached` needs them
  bf16* v_pages;
  const int32_t* cached;       // [L, N, H, cached_pages], pages before the fresh tokens; or null
  const int32_t* cached_kept;  // [L, N, H], how many tokens these have
  bf16* q;    // [L, T, Hq, D], rotated queries, or [T, Hq, D] of one layer after the other
  bf16* k;    // the same of rotated keys [.., T, H, D]
  bf16* v;    // and values
  float* lse;  // [L, T, Hq], receives the normalisers of the softmax; or null
  const int32_t* windows;  // [L], how many of the last tokens a token sees; 0: all
  // What is wanted of the last layer, or null where that is all of it.
  const int32_t* wanted_cu;    // [N + 1], among the wanted rows
  const int64_t* wanted_rows;  // [R], the last ones of each prompt
  bf16* wanted;                // [R, E], receives their hidden states, in place of `hidden`
  double* seconds;             // [3] of project, attention, finish: added to; or null
  int64_t num_layers;
  int64_t rows;
  int64_t num_sequences;
  int64_t num_wanted;
  int64_t cached_pages;
  int64_t page_tokens;
  int64_t keeps_all;  // whether q, k and v have room for all layers
  int64_t threads;
  float scale;
  float softcap;
};

using Attention = Attending<Bf16>;

// Fresh queries, keys and values of one layer.
struct Fresh {
  bf16* q;
  bf16* k;
  bf16* v;
};

Fresh fresh_of(const Step& s, int64_t layer) {
  const Projection& p = *s.layers[layer].projection;
  const int64_t tokens = s.keeps_all ? layer * s.rows * p.head_dim : 0;
  return {s.q + tokens * p.query_heads, s.k + tokens * p.kv_heads, s.v + tokens * p.kv_heads};
}

bool narrows(const Step& s, int64_t layer) {
  return s.wanted != nullptr && layer + 1 == s.num_layers;
}

// Attention of a layer; `wanted_q` are the queries that are wanted of the last one.
AttendArguments arguments_of(const Step& s, int64_t layer, const Activations& x, bf16* wanted_q) {
  const Projection& p = *s.layers[layer].projection;
  const Fresh fresh = fresh_of(s, layer);
  AttendArguments a{};
  a.q = narrows(s, layer) ? wanted_q : fresh.q;
  a.k = fresh.k;
  a.v = fresh.v;
  a.out = x.attended;
  if (s.lse != nullptr && !narrows(s, layer)) a.lse = s.lse + layer * s.rows * p.query_heads;
  a.cu_q = narrows(s, layer) ? s.wanted_cu : s.cu;
  a.cu_k = s.cu;
  a.q_stride = p.query_heads * p.head_dim;
  a.k_stride = a.v_stride = p.kv_heads * p.head_dim;
  a.num_sequences = static_cast<int>(s.num_sequences);
  a.num_heads = static_cast<int>(p.kv_heads);
  a.group = static_cast<int>(p.query_heads / p.kv_heads);
  a.dim = static_cast<int>(p.head_dim);
  a.page_tokens = 1;
  if (s.cached != nullptr) {
    a.k_pages = s.k_pages;
    a.v_pages = s.v_pages;
    a.kept = s.cached_kept + layer * s.num_sequences * p.kv_heads;
    a.page_table = s.cached + (a.kept - s.cached_kept) * s.cached_pages;
    a.page_tokens = static_cast<int>(s.page_tokens);
    a.max_pages = static_cast<int>(s.cached_pages);
  }
  a.window = s.windows[layer];
  a.scale = s.scale;
  a.softcap = s.softcap;
  return a;
}

// Copies this thread's part of fresh keys and values to their pages, but for what has left a window
// by the end of its prompt.
void store_pages(Team team, const Step& s, int64_t layer, const Fresh& fresh) {
  const Projection& p = *s.layers[layer].projection;
  const int64_t heads = s.rows * p.kv_heads;
  const int64_t* refs = s.refs + layer * heads;
  const auto [first, end] = team.share(heads);
  for (int64_t head = first; head < end; ++head) {
    if (refs[head] < 0) continue;
    const int64_t from = head * p.head_dim, to = refs[head] * p.head_dim;
    std::memcpy(s.k_pages + to, fresh.k + from, p.head_dim * sizeof(bf16));
    std::memcpy(s.v_pages + to, fresh.v + from, p.head_dim * sizeof(bf16));
  }
}

// Copies this thread's part of the wanted rows, [R, dim] of [T, dim].
void gather(Team team, const Step& s, const bf16* from, int64_t dim, bf16* to) {
  const auto [first, end] = team.share(s.num_wanted);
  for (int64_t row = first; row < end; ++row)
    std::memcpy(to + row * dim, from + s.wanted_rows[row] * dim, dim * sizeof(bf16));
}

// All layers; every thread of the team calls it. `next` counts the tiles that were taken.
void run_layers(Team team, const Step& s, Activations x, bf16* wanted_q,
                const std::deque<Attention>& attentions, std::atomic<int64_t>& next,
                std::atomic<int64_t>& arrived) {
  x.own = own_rows(s.layers[0]);
  TileMemory memory;
  Stopwatch watch(team, s.seconds);
  int64_t taken = 0;  // before this layer, the attempts that found none left among them
  bf16* hidden = s.hidden;
  int64_t rows = s.rows;
  for (int64_t layer = 0; layer < s.num_layers; ++layer) {
    const StepLayer& weights = s.layers[layer];
    const Projection& p = *weights.projection;
    const Fresh fresh = fresh_of(s, layer);
    project(team, weights, hidden, rows, x,
            Targets{s.positions, nullptr, fresh.q, fresh.k, fresh.v});
    if (narrows(s, layer)) {
      gather(team, s, fresh.q, p.query_heads * p.head_dim, wanted_q);
      gather(team, s, hidden, p.qkv.inputs, s.wanted);
      hidden = s.wanted;
      rows = s.num_wanted;
      team.barrier();
    }
    watch.lap(0);
    if (s.refs != nullptr) store_pages(team, s, layer, fresh);
    const Attention& attention = attentions[layer];
    for (int64_t tile; (tile = next.fetch_add(1) - taken) < attention.num_tiles();)
      attention.attend(tile, memory);
    taken += attention.num_tiles() + team.size;
    wait_ahead(team, arrived, (layer + 1) * team.size, *weights.finish->output);
    team.barrier();
    watch.lap(1);
    const bool is_last = layer + 1 == s.num_layers;
    finish(team, weights, is_last ? nullptr : &weights + 1, hidden, rows, x);
    watch.lap(2);
  }
}

}  // namespace
}  // namespace saqqara

// Takes prompts through layers: stores their keys and values, attends, and leaves the hidden states
// after the last layer.
extern "C" void saqqara_prefill_step(const saqqara::Step* step) {
  using namespace saqqara;
  thread_local Scratch scratch;
  thread_local Scratch queries;
  const Projection& p = *step->layers[0].projection;
  const Activations x =
      Activations::reserve(scratch, step->layers, step->num_layers, step->rows);
  bf16* wanted_q = queries.reserve(step->num_wanted * p.query_heads * p.head_dim);
  std::deque<Attention> attentions;
  for (int64_t layer = 0; layer < step->num_layers; ++layer)
    attentions.emplace_back(arguments_of(*step, layer, x, wanted_q));
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> arrived{0};
#pragma omp parallel num_threads(step->threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    run_layers(team, *step, x, wanted_q, attentions, next, arrived);
  }
}
