// The count-th largest of many 31-bit values by three histograms: of the upper 11 bits, the next 10, the last 10.
#pragma once
#include "../device/load.h"

namespace peta {

static constexpr int kBins = 2048, kBinGroups = 64, kBinsAGroup = kBins / kBinGroups;
static constexpr int kRounds = 3;
PF_HD int round_shift(int round) { return round == 0 ? 20 : round == 1 ? 10 : 0; }
PF_HD int round_bits(int round) { return round == 0 ? 11 : 10; }

// What is known of one order statistic: values whose bits above the round's are those of `prefix` are still in question.
struct Radix {
  uint64_t values;  // array of bits; 0: the elements of a task
  int64_t size;     // of the array
  int64_t count;    // from the largest, from 1; among those in question; 0 when nothing is asked for
  int64_t above, equal;
  uint32_t prefix;
  int32_t task;
};

// Whether a value is still in question in this round, and its bin.
PF_HD bool bin_of(uint32_t a, uint32_t prefix, int round, uint32_t* bin) {
  const int shift = round_shift(round), bits = round_bits(round);
  *bin = a >> shift & ((1u << bits) - 1u);
  return round == 0 || a >> (shift + bits) == prefix >> (shift + bits);
}

// Sums of kBinsAGroup bins each, by the block's threads below kBinGroups.
template <class Bin>
PF_HD void add_groups(const Bin* bins, int64_t* groups, int thread) {
  if (thread >= kBinGroups) return;
  int64_t sum = 0;
  for (int i = 0; i < kBinsAGroup; ++i) sum += int64_t(bins[thread * kBinsAGroup + i]);
  groups[thread] = sum;
}

// The bin that holds the count-th largest; by one thread.
template <class Bin>
PF_HD void narrow(Radix& r, const Bin* bins, const int64_t* groups, int round) {
  int64_t left = r.count;
  int group = kBinGroups - 1;
  for (; group > 0 && left > groups[group]; --group) left -= groups[group];
  int bin = group * kBinsAGroup + kBinsAGroup - 1;
  for (; bin > group * kBinsAGroup && left > int64_t(bins[bin]); --bin) left -= int64_t(bins[bin]);
  r.above += r.count - left, r.count = left, r.equal = int64_t(bins[bin]);
  r.prefix |= uint32_t(bin) << round_shift(round);
}

PF_HD uint32_t magnitude_bits(const Delta& d, int64_t i) { return bits_of(delta_element(d, i)) & kAbsMask; }

}  // namespace peta
