// Rows of pages, cut into the parts that decoding works on.
//
// Where a row is cut depends on its own length only, so its result does not depend on its company.

#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "attention_tiles.h"

namespace saqqara {

constexpr int kPartTokens = 512;
constexpr int kChunkTokens = kLanes;  // read from one address
constexpr int kMaxChunks = kPartTokens / kChunkTokens;
constexpr int kPrefetchChunks = 4;  // how long before its use a chunk is requested from memory

// Rows (sequence, kv head), numbered sequence * heads + head, and their pages.
template <class Number>
struct PagedRows {
  const Number* k_pages;
  const Number* v_pages;
  const int32_t* page_table;  // [slots, heads, max_pages], slots `slot_entries` apart
  const int64_t* slots;       // of each sequence; null where sequence n has slot n
  const int32_t* lengths;     // [num_rows]
  int64_t num_rows;
  int64_t num_heads;
  int64_t slot_entries;
  int64_t max_pages;
  int64_t page_tokens;
  int64_t dim;

  // Where a token of a row lies in the pages.
  int64_t find(int64_t row, int64_t token) const {
    const int64_t sequence = row / num_heads;
    const int64_t slot = slots == nullptr ? sequence : slots[sequence];
    const int32_t* pages = page_table + slot * slot_entries + row % num_heads * max_pages;
    const int64_t page = pages[token / page_tokens];
    return (page * page_tokens + token % page_tokens) * dim;
  }
};

// Tokens `first` to `first + count` of a row, and where each chunk of them lies, in the order in
// which they are read: keys, values, then the first keys of the part that the thread does next.
// Tokens of a chunk beyond the count lie there too, but mean nothing.
template <class Number>
struct Part {
  int64_t index;
  int64_t row;
  int64_t first;
  int count;
  int num_chunks;
  const Number* chunks[2 * kMaxChunks + kPrefetchChunks];
  std::vector<Number> copies;  // of tokens whose pages are not whole chunks

  const Number* const* keys() const { return chunks; }
  const Number* const* values() const { return chunks + num_chunks; }
  const Number** end() { return chunks + 2 * num_chunks; }
};

// Hands out the parts of all rows.
template <class Number>
class Parts {
 public:
  explicit Parts(const PagedRows<Number>& rows) : rows_(rows), first_part_(rows.num_rows + 1, 0) {
    for (int64_t row = 0; row < rows.num_rows; ++row) {
      first_part_[row + 1] = first_part_[row] + ceil_div(rows.lengths[row], kPartTokens);
    }
  }

  int64_t first_part(int64_t row) const { return first_part_[row]; }
  int64_t count() const { return first_part_.back(); }

  // How many nobody has taken yet; other threads may take some meanwhile.
  int64_t left() const { return count() - taken_.load(std::memory_order_relaxed); }

  // Takes the next part; false if there is none.
  bool take(Part<Number>& part) {
    part.index = taken_.fetch_add(1, std::memory_order_relaxed);
    if (part.index >= count()) return false;
    const auto after = std::upper_bound(first_part_.begin(), first_part_.end(), part.index);
    part.row = after - first_part_.begin() - 1;
    part.first = (part.index - first_part_[part.row]) * kPartTokens;
    part.count = std::min<int64_t>(kPartTokens, rows_.lengths[part.row] - part.first);
    part.num_chunks = ceil_div(part.count, kChunkTokens);
    if (rows_.page_tokens % kChunkTokens == 0) {
      for (int i = 0; i < part.num_chunks; ++i) {
        const int64_t at = rows_.find(part.row, part.first + i * kChunkTokens);
        part.chunks[i] = rows_.k_pages + at;
        part.chunks[part.num_chunks + i] = rows_.v_pages + at;
      }
    } else {
      copy_tokens(part);
    }
    return true;
  }

 private:
  // For pages that are not whole chunks: puts the tokens of a part together.
  void copy_tokens(Part<Number>& part) const {
    const int64_t dim = rows_.dim;
    part.copies.resize(2 * kPartTokens * dim);
    Number* const keys = part.copies.data();
    Number* const values = keys + kPartTokens * dim;
    for (int i = 0; i < part.count; ++i) {
      const int64_t at = rows_.find(part.row, part.first + i);
      std::copy_n(rows_.k_pages + at, dim, keys + i * dim);
      std::copy_n(rows_.v_pages + at, dim, values + i * dim);
    }
    for (int i = 0; i < part.num_chunks; ++i) {
      part.chunks[i] = keys + i * kChunkTokens * dim;
      part.chunks[part.num_chunks + i] = values + i * kChunkTokens * dim;
    }
  }

  const PagedRows<Number> rows_;
  std::vector<int64_t> first_part_;
  std::atomic<int64_t> taken_{0};
};

}  // namespace saqqara
