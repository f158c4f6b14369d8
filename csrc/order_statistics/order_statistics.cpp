#include "order_statistics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "../cpu.h"
#include "../pool.h"

namespace {

constexpr int64_t kGrain = 64 * kSelectBlock;  // elements a worker pulls at once
constexpr int64_t kSmallestSample = 4096, kLargestSample = 1 << 19;  // between them, 1/128 of the elements
constexpr int kRun = 32;                       // neighbours sampled together: one or two cache lines
constexpr int64_t kRunsAhead = 16;             // whose memory is asked for before it is needed

CountBlock count_block() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_count_block_avx512;
  if (simd_level() == kAvx2) return peta_count_block_avx2;
#endif
  return peta_count_block_baseline;
}

MagnitudeBlock magnitude_block() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_magnitude_block_avx512;
  if (simd_level() == kAvx2) return peta_magnitude_block_avx2;
#endif
  return peta_magnitude_block_baseline;
}

typedef std::pair<const uint32_t*, const uint32_t*> Span;

// The count-th largest of all values in the parts, and how many are larger or equal to it. Radix steps: a histogram of
// the values by their leading bits above the lowest possible, then the same within the bin that matters.
struct Kth {
  uint32_t value;
  int64_t above, equal;
};

Kth kth_largest(const std::vector<Span>& parts, uint32_t low, uint32_t high, int64_t count) {
  constexpr int kBits = 11, kBins = 1 << kBits;
  const int shift = std::max(0, (high > low ? 32 - __builtin_clz(high - low) : 1) - kBits);
  uint32_t bins[4][kBins] = {};  // neighbours are often equal: increments of one bin would wait for each other
  int64_t size = 0;
  for (const Span& part : parts) {
    const uint32_t* v = part.first;
    size += part.second - v;
    for (; part.second - v >= 4; v += 4)
      for (int j = 0; j < 4; ++j) ++bins[j][(v[j] - low) >> shift];
    for (; v < part.second; ++v) ++bins[0][(*v - low) >> shift];
  }
  int64_t above = 0, here = 0;
  uint32_t bin = kBins;
  while (above + here < count) {
    above += here, --bin;
    here = int64_t(bins[0][bin]) + bins[1][bin] + bins[2][bin] + bins[3][bin];
  }
  const uint32_t first = low + (bin << shift);
  if (shift == 0) return {first, above, here};
  std::vector<uint32_t> rest(here + 1);  // one more than needed: every value is written, and only those of the bin stay
  uint32_t* end = rest.data();
  for (const Span& part : parts)
    for (const uint32_t* v = part.first; v < part.second; ++v) {
      *end = *v;
      end += (*v - low) >> shift == bin;
    }
  const uint32_t last = first + ((1u << shift) - 1u);
  Kth found = kth_largest({{rest.data(), end}}, first, last, count - above);
  found.above += above;
  return found;
}

// Runs of neighbours at places that no stride of the data can match.
std::vector<uint32_t> sample(const SelectTask& task) {
  const int64_t wanted = std::clamp(task.size / 128, kSmallestSample, kLargestSample), runs = wanted / kRun;
  const MagnitudeBlock magnitudes = magnitude_block();
  std::vector<uint32_t> out(runs * kRun + 16);
  const int64_t stride = task.size / runs;
  const auto place = [&](int64_t j) {
    const uint64_t scattered = (uint64_t(j) + 1) * 0x9E3779B97F4A7C15u >> 20;
    return (j * stride + int64_t(scattered % uint64_t(stride - kRun + 1))) / kRun * kRun;
  };
  const Delta& d = task.delta;
  for (int64_t j = 0; j < runs; ++j) {
    const int64_t next = place(std::min(j + kRunsAhead, runs - 1));
    __builtin_prefetch((const uint8_t*)d.x + next * itemsize(d.dtype));
    if (d.base_kind == kBaseTensor && !d.is_delta)
      __builtin_prefetch((const uint8_t*)d.base + next * itemsize(d.base_dtype));
    magnitudes(d, place(j), kRun, &out[j * kRun]);
  }
  out.resize(runs * kRun);
  return out;
}

// Values of the sample's ranks `sigmas` standard deviations to either side of the one asked for.
Bracket bracket(const std::vector<uint32_t>& sampled, const SelectTask& task, int64_t count, double sigmas) {
  const double n = double(sampled.size()), q = double(count) / double(task.size);
  const double rank = q * n, slack = sigmas * std::sqrt(n * q * (1.0 - q)) + 2.0;
  const int64_t above = int64_t(std::floor(rank - slack)), below = int64_t(std::ceil(rank + slack));
  Bracket b{0, kAbsMask};
  const std::vector<Span> all{{sampled.data(), sampled.data() + sampled.size()}};
  if (above >= 1) b.high = kth_largest(all, 0, kAbsMask, above).value;
  if (below <= int64_t(sampled.size())) b.low = kth_largest(all, 0, kAbsMask, below).value;
  return b;
}

struct Grain {
  int64_t first_task, tasks;  // of one group
  int64_t begin, end;
};

struct Pass {  // of one (task, query)
  Bracket bracket;
  std::vector<BlockCount> blocks;
  std::vector<std::vector<uint32_t>> inside;  // by grain
  bool active = false;
};

// Element index, within block `block`, of the nth-th (from 1) |d| equal to `value`.
int64_t nth_equal(const SelectTask& task, int64_t block, int64_t nth, uint32_t value) {
  uint32_t a[kSelectBlock];
  const int64_t begin = block * kSelectBlock;
  const int n = int(std::min<int64_t>(kSelectBlock, task.size - begin));
  magnitude_block()(task.delta, begin, n, a);
  for (int i = 0; i < n; ++i)
    if (a[i] == value && --nth == 0) return begin + i;
  return begin + n - 1;  // not reached: the block was counted to hold it
}

int64_t last_kept_of_end(const SelectTask& task, const Pass& pass, uint32_t BlockCount::*end, int64_t keep,
                         uint32_t value) {
  int64_t block = 0;
  for (; keep > int64_t(pass.blocks[block].*end); ++block) keep -= pass.blocks[block].*end;
  return nth_equal(task, block, keep, value);
}

int64_t last_kept_inside(const SelectTask& task, const Pass& pass, int64_t keep, uint32_t value) {
  constexpr int64_t kBlocksAGrain = kGrain / kSelectBlock;
  for (size_t grain = 0; grain < pass.inside.size(); ++grain) {
    const uint32_t* v = pass.inside[grain].data();
    const int64_t first = int64_t(grain) * kBlocksAGrain;
    const int64_t last = std::min<int64_t>(first + kBlocksAGrain, int64_t(pass.blocks.size()));
    for (int64_t block = first; block < last; ++block) {
      const int64_t here = std::count(v, v + pass.blocks[block].inside, value);
      if (keep <= here) return nth_equal(task, block, keep, value);
      keep -= here;
      v += pass.blocks[block].inside;
    }
  }
  return task.size - 1;  // not reached
}

// Decides the query from what the pass has counted; false when the bracket missed.
bool decide(const SelectTask& task, const Pass& pass, SelectQuery& q) {
  int64_t above = 0, equal_high = 0, inside = 0, equal_low = 0;
  for (const BlockCount& b : pass.blocks)
    above += b.above, equal_high += b.equal_high, inside += b.inside, equal_low += b.equal_low;
  if (q.count <= above || q.count > above + equal_high + inside + equal_low) return false;
  q.last_index = INT64_MAX;
  if (q.count <= above + equal_high) {
    q.threshold = pass.bracket.high, q.above = above, q.equal = equal_high;
    if (q.count - above < q.equal)
      q.last_index = last_kept_of_end(task, pass, &BlockCount::equal_high, q.count - above, q.threshold);
    return true;
  }
  if (q.count > above + equal_high + inside) {
    q.threshold = pass.bracket.low, q.above = above + equal_high + inside, q.equal = equal_low;
    if (q.count - q.above < q.equal)
      q.last_index = last_kept_of_end(task, pass, &BlockCount::equal_low, q.count - q.above, q.threshold);
    return true;
  }
  std::vector<Span> parts;
  for (const auto& part : pass.inside) parts.emplace_back(part.data(), part.data() + part.size());
  const Kth found = kth_largest(parts, pass.bracket.low, pass.bracket.high, q.count - above - equal_high);
  q.threshold = found.value, q.above = above + equal_high + found.above, q.equal = found.equal;
  if (q.count - q.above < q.equal) q.last_index = last_kept_inside(task, pass, q.count - q.above, q.threshold);
  return true;
}

// One streaming pass over all groups that have an active query.
void stream(const SelectTask* tasks, int64_t num_tasks, std::vector<Pass>& passes, int threads) {
  std::vector<Grain> grains;
  for (int64_t t = 0; t < num_tasks;) {
    int64_t end = t;
    bool any = false;
    for (; end < num_tasks && tasks[end].group == tasks[t].group; ++end)
      for (int q = 0; q < tasks[end].queries; ++q) {
        Pass& pass = passes[tasks[end].first_query + q];
        if (!pass.active) continue;
        any = true;
        pass.blocks.assign((tasks[end].size + kSelectBlock - 1) / kSelectBlock, BlockCount{});
        pass.inside.assign((tasks[end].size + kGrain - 1) / kGrain, {});
      }
    if (any)
      for (int64_t at = 0; at < tasks[t].size; at += kGrain)
        grains.push_back({t, end - t, at, std::min(at + kGrain, tasks[t].size)});
    t = end;
  }
  if (threads <= 0) threads = default_threads();
  threads = int(std::clamp<int64_t>(int64_t(grains.size()), 1, threads));
  int64_t most = 1, longest = 0;  // queries of one group, elements of one grain
  for (const Grain& g : grains) {
    int64_t here = 0;
    longest = std::max(longest, g.end - g.begin);
    for (int64_t t = g.first_task; t < g.first_task + g.tasks; ++t) here += tasks[t].queries;
    most = std::max(most, here);
  }
  const int64_t room = longest + 16;
  std::vector<std::unique_ptr<uint32_t[]>> scratch(threads);  // left as it comes: few of its pages are ever touched
  const CountBlock count = count_block();
  parallel_for(int64_t(grains.size()), threads, [&](int64_t index, int worker) {
    const Grain& g = grains[index];
    if (!scratch[worker]) scratch[worker].reset(new uint32_t[room * most]);
    std::vector<Counting> counting;
    std::vector<Pass*> counted;
    for (int64_t t = g.first_task; t < g.first_task + g.tasks; ++t)
      for (int q = 0; q < tasks[t].queries; ++q) {
        Pass& pass = passes[tasks[t].first_query + q];
        if (!pass.active) continue;
        counting.push_back({&tasks[t].delta, pass.bracket, {}, scratch[worker].get() + int64_t(counted.size()) * room});
        counted.push_back(&pass);
      }
    for (int64_t at = g.begin; at < g.end; at += kSelectBlock) {
      count(counting.data(), int(counting.size()), at, int(std::min<int64_t>(kSelectBlock, g.end - at)));
      for (size_t i = 0; i < counting.size(); ++i) {
        counted[i]->blocks[at / kSelectBlock] = counting[i].count;
        counting[i].inside += counting[i].count.inside;
      }
    }
    for (size_t i = 0; i < counting.size(); ++i)
      counted[i]->inside[g.begin / kGrain].assign(scratch[worker].get() + int64_t(i) * room, counting[i].inside);
  });
}

// Adds the histogram of [0, size) under `bin_of`, which returns -1 for elements to be left out.
template <class BinOf>
void add_histogram(const Delta& delta, int64_t size, size_t num_bins, uint64_t* bins, int threads, BinOf bin_of) {
  if (threads <= 0) threads = default_threads();
  const int64_t grains = (size + kGrain - 1) / kGrain;
  threads = int(std::clamp<int64_t>(grains, 1, threads));
  std::vector<std::vector<uint32_t>> partial(threads);
  const MagnitudeBlock magnitudes = magnitude_block();
  std::vector<std::vector<uint64_t>> total(threads);
  parallel_for(grains, threads, [&](int64_t grain, int worker) {
    std::vector<uint32_t>& mine = partial[worker];
    if (mine.empty()) mine.assign(num_bins + kSelectBlock, 0), total[worker].assign(num_bins, 0);
    uint32_t* a = mine.data() + num_bins;
    const int64_t end = std::min((grain + 1) * kGrain, size);
    for (int64_t at = grain * kGrain; at < end; at += kSelectBlock) {
      const int n = int(std::min<int64_t>(kSelectBlock, end - at));
      magnitudes(delta, at, n, a);
      for (int i = 0; i < n; ++i) {
        const int64_t bin = bin_of(a[i]);
        if (bin >= 0) ++mine[bin];
      }
    }
    for (size_t i = 0; i < num_bins; ++i) total[worker][i] += mine[i], mine[i] = 0;
  });
  for (const auto& t : total)
    for (size_t i = 0; i < t.size(); ++i) bins[i] += t[i];
}

// The slow and certain way, for a bracket that missed twice.
void select_by_histogram(const SelectTask& task, SelectQuery& q, int threads) {
  std::vector<uint64_t> bins(65536, 0);
  magnitude_histogram(task.delta, task.size, bins.data(), threads);
  int64_t above = 0;
  uint32_t prefix = 65535;
  for (; above + int64_t(bins[prefix]) < q.count; --prefix) above += bins[prefix];
  bins.assign(32768, 0);
  magnitude_histogram_low(task.delta, task.size, prefix, bins.data(), threads);
  uint32_t low = 32767;
  for (; above + int64_t(bins[low]) < q.count; --low) above += bins[low];
  q.threshold = prefix << 15 | low, q.above = above, q.equal = int64_t(bins[low]), q.last_index = INT64_MAX;
  if (q.count - above == q.equal) return;
  int64_t keep = q.count - above;
  const MagnitudeBlock magnitudes = magnitude_block();
  uint32_t a[kSelectBlock];
  for (int64_t at = 0; at < task.size; at += kSelectBlock) {
    const int n = int(std::min<int64_t>(kSelectBlock, task.size - at));
    magnitudes(task.delta, at, n, a);
    const int64_t here = std::count(a, a + n, q.threshold);
    if (keep <= here) {
      q.last_index = nth_equal(task, at / kSelectBlock, keep, q.threshold);
      return;
    }
    keep -= here;
  }
}

}  // namespace

void select_magnitudes(const SelectTask* tasks, int64_t num_tasks, SelectQuery* queries, int threads) {
  int64_t num_queries = 0;
  for (int64_t t = 0; t < num_tasks; ++t) num_queries = std::max(num_queries, tasks[t].first_query + tasks[t].queries);
  std::vector<Pass> passes(num_queries);
  auto pending = [&](const SelectTask& task, auto&& visit) {
    for (int q = 0; q < task.queries; ++q) visit(queries[task.first_query + q], passes[task.first_query + q]);
  };
  for (int64_t t = 0; t < num_tasks; ++t) pending(tasks[t], [](SelectQuery&, Pass& pass) { pass.active = true; });
  for (double sigmas : {3.5, 14.0}) {
    if (std::none_of(passes.begin(), passes.end(), [](const Pass& pass) { return pass.active; })) return;
    parallel_for(num_tasks, threads, [&](int64_t t, int) {
      const SelectTask& task = tasks[t];
      std::vector<uint32_t> sampled;
      pending(task, [&](SelectQuery& q, Pass& pass) {
        if (!pass.active) return;
        pass.bracket = {0, kAbsMask};
        if (task.size <= 16384) return;  // small enough to keep every value
        if (sampled.empty()) sampled = sample(task);
        pass.bracket = bracket(sampled, task, q.count, sigmas);
      });
    });
    stream(tasks, num_tasks, passes, threads);
    parallel_for(num_tasks, threads, [&](int64_t t, int) {
      pending(tasks[t], [&](SelectQuery& q, Pass& pass) {
        if (pass.active && decide(tasks[t], pass, q)) pass.active = false;
        pass.blocks = {}, pass.inside = {};
      });
    });
  }
  for (int64_t t = 0; t < num_tasks; ++t)
    pending(tasks[t], [&](SelectQuery& q, Pass& pass) {
      if (pass.active) select_by_histogram(tasks[t], q, threads);
    });
}

void magnitude_histogram(const Delta& delta, int64_t size, uint64_t* bins, int threads) {
  add_histogram(delta, size, 65536, bins, threads, [](uint32_t a) { return int64_t(a >> 15); });
}

void magnitude_histogram_low(const Delta& delta, int64_t size, uint32_t prefix, uint64_t* bins, int threads) {
  add_histogram(delta, size, 32768, bins, threads,
                [prefix](uint32_t a) { return a >> 15 == prefix ? int64_t(a & 0x7fffu) : int64_t(-1); });
}

void ranked_probability(const Delta& delta, int64_t begin_row, int64_t rows, int64_t columns, double low, double high,
                        float* out, int threads) {
  struct Entry {
    uint32_t value, index;
  };
  const MagnitudeBlock magnitudes = magnitude_block();
  parallel_for(rows, threads, [&](int64_t row, int) {
    std::vector<uint32_t> a(columns + 16);
    for (int64_t at = 0; at < columns; at += kSelectBlock)
      magnitudes(delta, (begin_row + row) * columns + at, int(std::min<int64_t>(kSelectBlock, columns - at)), &a[at]);
    std::vector<Entry> from(columns), to(columns);
    for (int64_t i = 0; i < columns; ++i) from[i] = {a[i], uint32_t(i)};
    for (int shift : {0, 11, 22}) {  // least significant digit first, stable: equals stay in index order
      int64_t starts[2048] = {};
      for (const Entry& e : from) ++starts[e.value >> shift & 2047u];
      int64_t sum = 0;
      for (int64_t& s : starts) sum += std::exchange(s, sum);
      for (const Entry& e : from) to[starts[e.value >> shift & 2047u]++] = e;
      from.swap(to);
    }
    float* row_out = out + row * columns;
    const double span = high - low;
    if (columns == 1) row_out[0] = float(low + span * 0.5);
    else
      for (int64_t rank = 0; rank < columns; ++rank)
        row_out[from[rank].index] = float(low + span * double(rank) / double(columns - 1));
  });
}
