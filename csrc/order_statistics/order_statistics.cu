// The C interface of selection on a device: which tensors are one block's work, samples, tables, launches.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "stream.h"

namespace peta {
namespace {

constexpr double kSigmas = 4.5;
constexpr int kRunsAUnit = 2048;
enum Stream : int { kStreamF32 = 0, kStreamF16 = 1, kStreamBF16 = 2, kStreamAny = 3, kStreams = 4 };

// What peta_select needs on the host; the rest of the blob is tables for the device. Offsets are in bytes.
struct Header {
  int64_t tasks, queries, wanted, radix, units, samples, arrays, small, small_tasks;
  int64_t num_tasks, num_queries, num_wanted, num_radix, num_units, num_samples, num_arrays, num_candidate_arrays,
      num_small;
  int64_t first_unit[kStreams + 1];
  int64_t bins, missed;  // offsets in the scratch; one after the other
  int64_t wants_index;
  int64_t bytes, scratch;
};

Stream stream_of(const Delta& d) {
  const bool plain = d.base_kind == kBaseTensor && !d.is_delta && d.dtype == d.base_dtype;
  return plain ? Stream(d.dtype) : kStreamAny;
}

int64_t sample_size(int64_t size) {
  const int64_t wanted = size / 128 < 8192 ? 8192 : size / 128 > (1 << 19) ? 1 << 19 : size / 128;
  return wanted / TakeSample::kRun * TakeSample::kRun;
}

// Lays everything out; with a null blob only to know how much there is.
class Layout {
 public:
  Layout(const SelectTask* tasks, int64_t num_tasks, const SelectQuery* queries, int64_t num_queries)
      : tasks_(tasks), num_tasks_(num_tasks), queries_(queries), num_queries_(num_queries) {
    for (int64_t t = 0; t < num_tasks; ++t) {
      if (tasks[t].size <= kSmall)
        for (int32_t q = 0; q < tasks[t].queries; ++q) small_.push_back(tasks[t].first_query + q), small_tasks_.push_back(int32_t(t));
      else large(int32_t(t));
    }
    candidates_first_ = int64_t(arrays_.size());
    for (size_t i = 0; i < wanted_.size(); ++i)
      for (int64_t at = 0; at < wanted_[i].capacity; at += kChunk) arrays_.push_back({wanted_[i].low_radix, at});
    units();
    place();
  }

  const Header& header() const { return header_; }

  // device, scratch: where the blob and the scratch will be.
  void fill(uint8_t* blob, uint64_t scratch) {
    for (Wanted& w : wanted_) {
      w.candidates += scratch;
      if (w.tile_equals) w.tile_equals += scratch - 1;  // offsets begin at 1 where there are any
    }
    for (Radix& r : radix_) r.values += scratch;
    for (SampleUnit& u : samples_) u.to += scratch;
    memcpy(blob, &header_, sizeof header_);
    put(blob, header_.tasks, tasks_, num_tasks_), put(blob, header_.queries, queries_, num_queries_);
    put(blob, header_.wanted, wanted_), put(blob, header_.radix, radix_), put(blob, header_.units, units_);
    put(blob, header_.samples, samples_), put(blob, header_.arrays, arrays_);
    put(blob, header_.small, small_), put(blob, header_.small_tasks, small_tasks_);
  }

 private:
  template <class T>
  static void put(uint8_t* blob, int64_t offset, const T* from, int64_t count) {
    if (count) memcpy(blob + offset, static_cast<const void*>(from), size_t(count) * sizeof(T));
  }
  template <class T>
  static void put(uint8_t* blob, int64_t offset, const std::vector<T>& from) {
    put(blob, offset, from.data(), int64_t(from.size()));
  }

  int64_t take(int64_t bytes) {
    const int64_t here = scratch_;
    scratch_ += ceil_div(bytes, 256) * 256;
    return here;
  }

  void large(int32_t t) {
    const SelectTask& task = tasks_[t];
    const int64_t sampled = sample_size(task.size), runs = sampled / TakeSample::kRun;
    const uint64_t sample = uint64_t(take(sampled * 4));
    for (int64_t run = 0; run < runs; run += kRunsAUnit)
      samples_.push_back({t, 0, run, smaller(kRunsAUnit, runs - run), runs, sample + uint64_t(run * TakeSample::kRun * 4)});
    for (int32_t q = 0; q < task.queries; ++q) {
      const SelectQuery& query = queries_[task.first_query + q];
      const double n = double(sampled), share = double(query.count) / double(task.size), rank = share * n;
      const double slack = kSigmas * std::sqrt(n * share * (1.0 - share)) + 2.0;
      const int64_t above = int64_t(std::floor(rank - slack)), below = int64_t(std::ceil(rank + slack));
      Wanted w{};
      w.query = task.first_query + q, w.task = t;
      w.high_radix = bound(above >= 1 ? above : 0, sample, sampled, t);
      w.low_radix = bound(below <= sampled ? below : 0, sample, sampled, t);
      w.capacity = smaller(int64_t(3.0 * slack / n * double(task.size)) + 8192, task.size);
      w.candidates = uint64_t(take(w.capacity * 4));
      if (wants_index(query)) w.tile_equals = uint64_t(take(ceil_div(task.size, kSelectTile) * 4)) + 1, wants_index_ = 1;
      wanted_.push_back(w);
    }
    largest_.push_back({t, int64_t(wanted_.size()) - task.queries});
  }

  // A rank of the sample that is one end of a bracket; 0: the bracket has no such end.
  int64_t bound(int64_t rank, uint64_t sample, int64_t sampled, int32_t t) {
    radix_.push_back(Radix{sample, sampled, rank, 0, 0, 0, t});
    const int64_t place = int64_t(radix_.size()) - 1;
    if (rank)
      for (int64_t at = 0; at < sampled; at += kChunk) arrays_.push_back({place, at});
    return place;
  }

  // Queries of one tensor and one kind of stream share units, kSlots at a time.
  void units() {
    for (int stream = 0; stream < kStreams; ++stream) {
      header_.first_unit[stream] = int64_t(units_.size());
      for (size_t i = 0; i < largest_.size();) {
        const SelectTask& first = tasks_[largest_[i].first];
        std::vector<int32_t> slots;
        size_t next = i;
        for (; next < largest_.size() && tasks_[largest_[next].first].group == first.group; ++next) {
          const SelectTask& task = tasks_[largest_[next].first];
          if (task.delta.base != first.delta.base || task.size != first.size) break;
          if (stream_of(task.delta) != stream) continue;
          for (int32_t q = 0; q < task.queries; ++q) slots.push_back(int32_t(largest_[next].second + q));
        }
        for (int64_t tile = 0; tile < ceil_div(first.size, kSelectTile); ++tile)
          for (size_t at = 0; at < slots.size(); at += kSlots) {
            Unit unit{{-1, -1, -1, -1}, tile};
            for (size_t k = at; k < slots.size() && k < at + kSlots; ++k) unit.slots[k - at] = slots[k];
            units_.push_back(unit);
          }
        i = next;
      }
    }
    header_.first_unit[kStreams] = int64_t(units_.size());
  }

  void place() {
    Header& h = header_;
    int64_t at = int64_t(sizeof(Header));
    const auto table = [&](int64_t& offset, int64_t& count, int64_t n, size_t each) {
      at = ceil_div(at, 64) * 64, offset = at, count = n, at += n * int64_t(each);
    };
    int64_t unused;
    table(h.tasks, h.num_tasks, num_tasks_, sizeof(SelectTask));
    table(h.queries, h.num_queries, num_queries_, sizeof(SelectQuery));
    table(h.wanted, h.num_wanted, int64_t(wanted_.size()), sizeof(Wanted));
    table(h.radix, h.num_radix, int64_t(radix_.size()), sizeof(Radix));
    table(h.units, h.num_units, int64_t(units_.size()), sizeof(Unit));
    table(h.samples, h.num_samples, int64_t(samples_.size()), sizeof(SampleUnit));
    table(h.arrays, h.num_arrays, candidates_first_, sizeof(ArrayUnit));
    h.num_candidate_arrays = int64_t(arrays_.size()) - candidates_first_;
    at += h.num_candidate_arrays * int64_t(sizeof(ArrayUnit));
    table(h.small, h.num_small, int64_t(small_.size()), sizeof(int64_t));
    table(h.small_tasks, unused, int64_t(small_tasks_.size()), sizeof(int32_t));
    h.bins = take(h.num_radix * kBins * 8);
    h.missed = take(4);
    h.wants_index = wants_index_, h.bytes = ceil_div(at, 64) * 64, h.scratch = scratch_;
  }

  const SelectTask* tasks_;
  int64_t num_tasks_;
  const SelectQuery* queries_;
  int64_t num_queries_;
  std::vector<Wanted> wanted_;
  std::vector<Radix> radix_;
  std::vector<Unit> units_;
  std::vector<SampleUnit> samples_;
  std::vector<ArrayUnit> arrays_;
  std::vector<int64_t> small_;
  std::vector<int32_t> small_tasks_;
  std::vector<std::pair<int32_t, int64_t>> largest_;  // large tasks, and their first place among the wanted
  int64_t candidates_first_ = 0, scratch_ = 0, wants_index_ = 0;
  Header header_{};
};

// Three rounds over arrays of `count` units from `first` on, and over tensors whose bracket missed.
int narrow_all(SelectTables tables, int64_t first, int64_t count, bool tensors, const Place& place, const char* who) {
  tables.arrays += first;
  int failed = 0;
  for (int round = 0; round < kRounds && !failed; ++round) {
    failed = launch(CountArrays{tables, round}, count, place, who);
    if (!failed && tensors)
      failed = launch(CountTensors{tables, round}, smaller(tables.num_units, full_grid(place, 8)), place, who);
    if (!failed) failed = launch(NarrowAll{tables, round}, tables.num_radix, place, who);
  }
  return failed;
}

template <class Kernel>
int launch_for_queries(const SelectTables& tables, const Place& place, const char* who) {
  const Kernel kernel{{tables}};
  return launch(kernel, kernel.blocks(), place, who);
}

int stream_all(SelectTables tables, const Header& h, const Place& place, const char* who) {
  const Unit* const units = tables.units;
  int failed = 0;
  for (int stream = 0; stream < kStreams && !failed; ++stream) {
    tables.units = units + h.first_unit[stream];
    const int64_t count = h.first_unit[stream + 1] - h.first_unit[stream];
    if (stream == kStreamF32) failed = launch(CountTile<kF32>{tables}, count, place, who);
    else if (stream == kStreamF16) failed = launch(CountTile<kF16>{tables}, count, place, who);
    else if (stream == kStreamBF16) failed = launch(CountTile<kBF16>{tables}, count, place, who);
    else failed = launch(CountTile<-1>{tables}, count, place, who);
  }
  return failed;
}

}  // namespace
}  // namespace peta

// Bytes of the blob of tables and of scratch, and the place of the queries within the blob.
PETA_EXPORT void peta_select_sizes(const SelectTask* tasks, int64_t num_tasks, const SelectQuery* queries,
                                   int64_t num_queries, int64_t* blob, int64_t* scratch, int64_t* queries_at) {
  const peta::Layout layout(tasks, num_tasks, queries, num_queries);
  *blob = layout.header().bytes, *scratch = layout.header().scratch, *queries_at = layout.header().queries;
}

// Fills the blob, on the host.
PETA_EXPORT void peta_select_fill(const SelectTask* tasks, int64_t num_tasks, const SelectQuery* queries,
                                  int64_t num_queries, uint8_t* blob, uint64_t scratch) {
  peta::Layout(tasks, num_tasks, queries, num_queries).fill(blob, scratch);
}

// blob: on the host; device_blob: its copy on the device, where the queries find their results; scratch: as the blob
// says. Returns at once; the results are there when the stream gets so far.
PETA_EXPORT int32_t peta_select(Place place, const uint8_t* blob, uint8_t* device_blob, uint8_t* scratch) {
  const char* const who = "order_statistics";
  if (const int failed = peta::enter(place, who)) return failed;
  peta::Header h;
  memcpy(&h, blob, sizeof h);
  using namespace peta;
  const auto table = [&](auto* none, int64_t offset) { return reinterpret_cast<decltype(none)>(device_blob + offset); };
  SelectTables tables{table((const SelectTask*)nullptr, h.tasks), table((SelectQuery*)nullptr, h.queries),
                      table((Wanted*)nullptr, h.wanted), table((Radix*)nullptr, h.radix),
                      reinterpret_cast<uint64_t*>(scratch + h.bins),
                      reinterpret_cast<uint32_t*>(scratch + h.missed), table((const Unit*)nullptr, h.units),
                      table((const SampleUnit*)nullptr, h.samples), table((const ArrayUnit*)nullptr, h.arrays),
                      table((const int64_t*)nullptr, h.small), table((const int32_t*)nullptr, h.small_tasks),
                      h.num_wanted, h.num_radix, h.num_units, h.num_samples, h.num_arrays, h.num_small};
  int failed = launch(SmallSelect{tables}, h.num_small, place, who);
  if (failed || !h.num_wanted) return failed;
  if (!failed) failed = clear(tables.bins, h.missed + 4 - h.bins, place, who);
  if (!failed) failed = launch(TakeSample{tables}, h.num_samples, place, who);
  if (!failed) failed = narrow_all(tables, 0, h.num_arrays, false, place, who);
  if (!failed) failed = launch_for_queries<SetBrackets>(tables, place, who);
  if (!failed) failed = stream_all(tables, h, place, who);
  if (!failed) failed = launch_for_queries<Decide>(tables, place, who);
  if (!failed) failed = narrow_all(tables, h.num_arrays, h.num_candidate_arrays, true, place, who);
  if (!failed) failed = launch_for_queries<Finish>(tables, place, who);
  if (!failed && h.wants_index) failed = launch(CountEquals{tables}, h.num_units, place, who);
  if (!failed && h.wants_index) failed = launch(Locate{tables}, h.num_wanted, place, who);
  return failed;
}
