// Looking at whole rows of scores, for those who choose from them.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "simd.h"

namespace qkv {

struct Scored {  // rows of scores, in blocks of `size`; the last block of a row may be shorter
  const float* x;
  int64_t rows, width, size;

  int64_t per_row() const { return (width + size - 1) / size; }
  int64_t blocks() const { return rows * per_row(); }
};

// Folds block k of all rows, counted through: found = each(found, the next LANES scores). What a row lacks is −∞.
template <class Each>
inline F fold(const Scored& scores, int64_t k, F found, Each each) {
  const int64_t at = k % scores.per_row() * scores.size, end = std::min(at + scores.size, scores.width);
  const float* x = scores.x + k / scores.per_row() * scores.width;
  for (int64_t i = at; i < end; i += LANES) {
    F some = splat(-INFINITY);
    if (end - i >= LANES) some = load(x + i);
    else memcpy(&some, x + i, (end - i) * sizeof(float));
    found = each(found, some);
  }
  return found;
}

// The largest of a block.
inline float maximum(const Scored& scores, int64_t k) {
  return largest(fold(scores, k, splat(-INFINITY), [](F most, F x) { return max(x, most); }));
}

// Σ e^{(x_i − m) / T} over a block, m the row's.
inline float mass(const Scored& scores, int64_t k, const float* m, float T) {
  const F top = splat(m[k / scores.per_row()]), inverse = splat(1 / T), least = splat(-87.0f);
  return sum(fold(scores, k, F{}, [&](F total, F x) {
    const F y = (x - top) * inverse;
    return total + choose(y > least, exp(y), F{});  // what is less is as good as nothing
  }));
}

// The k largest of a row and where they stand, largest first, of equal ones the first. None of them is less than the
// k-th largest of the blocks' maxima. What is no number is not looked at: where too few are left, some places at −∞.
inline void k_largest(const Scored& scores, int64_t row, const float* maxima, int k, float* values, int64_t* places) {
  const int64_t blocks = scores.per_row();
  const float *x = scores.x + row * scores.width, *most = maxima + row * blocks;
  float least = -INFINITY;
  if (k < blocks) {
    std::vector<float> sorted(most, most + blocks);
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<>());
    least = sorted[k - 1];
  }
  struct Found {
    float value;
    int64_t place;
  };
  std::vector<Found> found;
  for (int64_t b = 0; b < blocks; b++) {
    if (!(most[b] >= least)) continue;
    for (int64_t i = b * scores.size; i < std::min((b + 1) * scores.size, scores.width); i++)
      if (x[i] >= least) found.push_back({x[i], i});
  }
  const int some = std::min<int64_t>(k, found.size());
  std::partial_sort(found.begin(), found.begin() + some, found.end(), [](const Found& a, const Found& b) {
    return a.value > b.value || (a.value == b.value && a.place < b.place);
  });
  for (int i = 0; i < k; i++) {
    const Found one = i < some ? found[i] : Found{-INFINITY, i};
    values[i] = one.value, places[i] = one.place;
  }
}

}  // namespace qkv
