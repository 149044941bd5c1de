// Routing: which experts a row goes to, and the rows of each expert side by side.
#pragma once
#include <algorithm>
#include <vector>

#include "norm.h"
#include "program.h"

namespace qkv {

// The k likeliest of n experts and their softmax, over all n or over the k alone: k numbers, then k weights.
inline void route(const Op& op, const float* logits, float* to) {
  const int n = op.inputs, k = op.choices;
  float* weights = to + k;
  for (int c = 0; c < k; c++) {
    int best = -1;
    for (int e = 0; e < n; e++) {
      if (std::any_of(to, to + c, [&](float taken) { return (int)taken == e; })) continue;
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    to[c] = best, weights[c] = logits[best];
  }
  const float top = weights[0];
  float all = 0;
  if (op.normalise) {
    for (int c = 0; c < k; c++) all += std::exp(weights[c] - top);
  } else {
    for (int e = 0; e < n; e++) all += std::exp(logits[e] - top);
  }
  for (int c = 0; c < k; c++) weights[c] = std::exp(weights[c] - top) / all;
}

struct Pair {  // a row that goes to an expert, and which of the row's choices that is
  int row, choice;
};

// All pairs, those of an expert side by side; expert e has from[e] to from[e + 1].
struct Routed {
  std::vector<Pair> pairs;
  std::vector<int> from;

  template <class At>
  void sort(int rows, int experts, int choices, At routes) {  // routes(row) → what `route` wrote
    from.assign(experts + 1, 0);
    pairs.resize((size_t)rows * choices);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < choices; c++) from[(int)routes(r)[c] + 1]++;
    for (int e = 0; e < experts; e++) from[e + 1] += from[e];
    std::vector<int> next(from.begin(), from.end() - 1);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < choices; c++) pairs[next[(int)routes(r)[c]]++] = {r, c};
  }
};

}  // namespace qkv
