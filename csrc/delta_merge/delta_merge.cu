// The C interface of the fused merge on a device: which kernel serves which piece, tiles, launches.
#include "kernels_general.h"
#include "kernels_plain.h"

namespace peta {

enum Kernel : int32_t {
  kNone = 0,
  kPlainSum = 1,    // + 4 dtype + 1, 2, 3 for exactly 3, up to 4, up to 8 tasks
  kPlainTies = 13,  // the same
  kSumBF16 = 25,    // sums by any rule of keeping, masks and weights, 16 bytes at once
  kSumF16 = 26,
  kGeneralSum = 27,
  kGeneralExtreme = 28,
  kElectSum = 29,
  kElectExtreme = 30,
  kMedianKernel = 31,
  kNormKernel = 32,
  kSignKernel = 33,
};

namespace {

bool has_one_dtype(const Piece& piece, const Task* tasks, int32_t dtype) {
  bool same = piece.out_dtype == dtype && piece.base_dtype == dtype;
  for (int t = 0; t < piece.tasks; ++t) same &= tasks[t].dtype == dtype;
  return same;
}

Kernel kernel_for(int32_t mode, const Piece& piece, const Task* tasks, const Rule& rule) {
  if (mode == kKeptNorm) return kNormKernel;
  if (mode == kSignTotal) return kSignKernel;
  if (is_plain(piece, tasks, rule, 8)) {
    const int32_t first = rule.elect == kElectNone ? kPlainSum : kPlainTies;
    const int32_t room = piece.tasks > 4 ? 3 : piece.tasks == 3 ? 1 : 2;
    return Kernel(first + 4 * piece.out_dtype + room);
  }
  if (rule.aggregate == kMedian) return kMedianKernel;
  const bool extreme = rule.aggregate != kSum;
  if (rule.elect != kElectNone) return extreme ? kElectExtreme : kElectSum;
  if (extreme) return kGeneralExtreme;
  if (rule.base_kind == kBaseTensor && has_one_dtype(piece, tasks, kBF16)) return kSumBF16;
  if (rule.base_kind == kBaseTensor && has_one_dtype(piece, tasks, kF16)) return kSumF16;
  return kGeneralSum;
}

int64_t tiles_of(int32_t mode, const Piece& piece) {
  if (piece.size <= 0) return 0;
  if (mode != kKeptNorm) return ceil_div(piece.size, kMergeTile);
  return ceil_div(piece.size, kBlock) * ceil_div(piece.tasks, KeptNorm::kWarps);
}

int run(int32_t kernel, const MergeTables& tables, int64_t tiles, const Place& place) {
  const char* const who = "delta_merge";
  switch (kernel) {
#define PETA_PLAIN(dtype, first, electing)                                                        \
  case first + 4 * dtype + 1: return launch(PlainMerge<dtype, electing, 3>{tables}, tiles, place, who); \
  case first + 4 * dtype + 2: return launch(PlainMerge<dtype, electing, 4>{tables}, tiles, place, who); \
  case first + 4 * dtype + 3: return launch(PlainMerge<dtype, electing, 8>{tables}, tiles, place, who);
    PETA_PLAIN(kF32, kPlainSum, false)
    PETA_PLAIN(kF32, kPlainTies, true)
    PETA_PLAIN(kF16, kPlainSum, false)
    PETA_PLAIN(kF16, kPlainTies, true)
    PETA_PLAIN(kBF16, kPlainSum, false)
    PETA_PLAIN(kBF16, kPlainTies, true)
#undef PETA_PLAIN
    case kSumBF16: return launch(GeneralMerge<kBF16, 8, false, false>{tables}, tiles, place, who);
    case kSumF16: return launch(GeneralMerge<kF16, 8, false, false>{tables}, tiles, place, who);
    case kGeneralSum: return launch(GeneralMerge<-1, 4, false, false>{tables}, tiles, place, who);
    case kGeneralExtreme: return launch(GeneralMerge<-1, 4, false, true>{tables}, tiles, place, who);
    case kElectSum: return launch(GeneralMerge<-1, 4, true, false>{tables}, tiles, place, who);
    case kElectExtreme: return launch(GeneralMerge<-1, 4, true, true>{tables}, tiles, place, who);
    case kMedianKernel: return launch(MedianMerge{tables}, tiles, place, who);
    case kNormKernel: return launch(KeptNorm{tables}, tiles, place, who);
    case kSignKernel: return launch(SignTotal{tables}, tiles, place, who);
    default: return fail(-1, who, "unknown kernel");
  }
}

}  // namespace
}  // namespace peta

// A run of tiles that one kernel serves.
struct MergeLaunch {
  int64_t first_tile, tiles;
  int32_t kernel, pad;
};

// How many tiles the pieces have, or -1 where they are too many.
PETA_EXPORT int64_t peta_merge_tiles(int32_t mode, const Piece* pieces, int64_t num_pieces) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_pieces; ++i) {
    const int64_t tiles = peta::tiles_of(mode, pieces[i]);
    if (tiles > INT32_MAX) return -1;
    count += tiles;
  }
  return count;
}

// Fills tiles[peta_merge_tiles] and launches[MOST_LAUNCHES] (peta_fast/ops/device.py), on the host; returns the number
// of launches, -1 for what no kernel can do. Pieces that one kernel serves stand together.
PETA_EXPORT int32_t peta_merge_layout(int32_t mode, const Piece* pieces, int64_t num_pieces, const Task* tasks,
                                      const Rule* rules, peta::Tile* tiles, MergeLaunch* launches, uint8_t* kernels) {
  for (int64_t i = 0; i < num_pieces; ++i) {
    const Piece& p = pieces[i];
    if (mode == kMerge && rules[p.rule].aggregate == kMedian && p.tasks > peta::MedianMerge::kRoom) return -1;
    kernels[i] = uint8_t(peta::kernel_for(mode, p, tasks + p.first_task, rules[p.rule]));
  }
  int64_t filled = 0;
  int32_t count = 0;
  for (int32_t kernel = peta::kPlainSum; kernel <= peta::kSignKernel; ++kernel) {
    const int64_t first = filled;
    for (int64_t i = 0; i < num_pieces; ++i) {
      if (kernels[i] != kernel) continue;
      const int64_t n = peta::tiles_of(mode, pieces[i]);
      for (int64_t k = 0; k < n; ++k) tiles[filled++] = {int32_t(i), int32_t(k)};
    }
    if (filled > first) launches[count++] = {first, filled - first, kernel, 0};
  }
  return count;
}

// Tables in device memory, launches on the host.
PETA_EXPORT int32_t peta_delta_merge(Place place, Piece* pieces, const Task* tasks, const Rule* rules,
                                     const peta::Tile* tiles, const MergeLaunch* launches, int32_t num_launches) {
  if (const int failed = peta::enter(place, "delta_merge")) return failed;
  for (int32_t i = 0; i < num_launches; ++i) {
    const peta::MergeTables tables{pieces, tasks, rules, tiles + launches[i].first_tile};
    if (const int failed = peta::run(launches[i].kernel, tables, launches[i].tiles, place)) return failed;
  }
  return 0;
}
