// Tensor maps, and the copies of their boxes; and additions of shared memory, which are copies of boxes here.
#include <array>
#include <cstring>
#include <map>
#include <stdexcept>

#include "asynchronous.h"
#include "simt_hopper.h"

namespace simt {
namespace {

constexpr int kMostBox = 256;

// 16-byte chunks change places within their row, by bits of the address.
uintptr_t swizzled(uintptr_t address, int swizzle) {
  const uintptr_t mask = (uintptr_t{1} << swizzle) - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

// Calls each(bytes from the box's begin, where the row's elements that lie inside of the tensor begin in memory, their
// bytes, and bytes of the row before them) for the box's rows, along the innermost dimension. No bytes: all lie
// outside.
template <typename Each>
void for_rows(const BoxCopy& copy, Each each) {
  const TensorMap& map = copy.map;
  const int row_bytes = map.box[0] * map.element_bytes;
  const int64_t first = std::max<int64_t>(0, -int64_t{copy.at[0]});
  const int64_t last = std::min<int64_t>(map.box[0], map.sizes[0] - copy.at[0]);
  for (int row = 0; row * row_bytes < copy.bytes; ++row) {
    bool inside = first < last;
    const char* data = map.data + (copy.at[0] + first) * map.element_bytes;
    for (int i = 1, rest = row; i < map.rank; rest /= map.box[i++]) {
      const int64_t at = int64_t{copy.at[i]} + rest % map.box[i];
      inside = inside && 0 <= at && at < map.sizes[i];
      // Modulo 2^64, as addresses are.
      data = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(data) +
                                           static_cast<uint64_t>(at) * static_cast<uint64_t>(map.strides[i]));
    }
    const auto bytes = inside ? static_cast<int>(last - first) * map.element_bytes : 0;
    each(row * row_bytes, inside ? const_cast<char*>(data) : nullptr, bytes,
         inside ? static_cast<int>(first) * map.element_bytes : 0);
  }
}

// Stores that a thread has begun, oldest first, and how many each committed group has.
struct Stores {
  std::vector<BoxCopy> copies;
  std::vector<size_t> groups;
  Code unfinished_add;
};
std::map<int, Stores> stores;  // by thread
std::array<int, kMaxCluster> last_storing;

void check_rank(const Thread& me, const TensorMap& map, int rank, Code code, const char* did) {
  if (map.rank != rank) bad_call(me, code, did, "the tensor map is of " + std::to_string(map.rank) + " dimensions");
}

BoxCopy checked(const Thread& me, const TensorMap& map, int alignment, const void* shared, const int* at, Code code,
                const char* did) {
  BoxCopy copy{};
  copy.map = map;
  copy.shared = reinterpret_cast<uintptr_t>(shared);
  copy.bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) {
    copy.at[i] = at[i];
    copy.bytes *= map.box[i];
  }
  copy.thread = me.index;
  copy.code = code;
  if (!in_shared(shared)) bad_call(me, code, did, "boxes lie in shared memory");
  const uintptr_t offset = copy.shared - shared_begin;
  if (offset % alignment != 0) {
    Report finding{.kind = Kind::misaligned, .now = side(me, code, did)};
    finding.address = copy.shared;
    finding.bytes = copy.bytes;
    finding.text = "the box must begin at a multiple of " + std::to_string(alignment) + " bytes";
    stop(std::move(finding));
  }
  if (offset > state.launch.shared_bytes || copy.bytes > static_cast<int64_t>(state.launch.shared_bytes - offset)) {
    Report finding{.kind = Kind::out_of_bounds, .now = side(me, code, did)};
    finding.address = copy.shared;
    finding.bytes = copy.bytes;
    stop(std::move(finding));
  }
  return copy;
}

// To block `rank`: `copy` and `barrier` are told as of the block itself.
void begin_load(Thread& me, BoxCopy copy, uintptr_t barrier, int rank, const char* did) {
  const uintptr_t further = shared_of(rank) - shared_begin;
  copy.what = Moves::load;
  copy.shared += further;
  touch_block(me, rank, Lasts::until_awaited, copy.code, "began a tma_load to", copy.shared, copy.bytes);
  const int number = mbarrier_for_copy(me, rank, barrier + further, copy.code, did);
  Thread& actor = act_for(me, load_actor(number));
  copy.time = actor.time;
  for (int i = 0; i < copy.bytes; i += 16) access_shared(actor, copy.shared + i, true, copy.code);
  for_rows(copy, [&](int, char* data, int bytes, int) {
    if (bytes == 0) return;
    access_global(actor, data, bytes, Doing::read, copy.code);
    set_read(data, bytes, true);
  });
  set_in_flight(copy.shared, copy.bytes, true);
  add_load(number, copy, did);
}

void begin_store(Thread& me, BoxCopy& copy) {
  const bool adds = copy.what == Moves::add;
  last_storing[me.rank] = me.index;
  Thread& reader = act_for(me, store_actor(me));
  copy.time = reader.time;
  for (int i = 0; i < copy.bytes; i += 16) access_shared(reader, copy.shared + i, false, copy.code);
  set_read(reinterpret_cast<void*>(copy.shared), copy.bytes, true);
  Thread& writer = act_for(me, write_actor(me));
  for_rows(copy, [&](int, char* data, int bytes, int) {
    if (bytes > 0) access_global(writer, data, bytes, adds ? Doing::atomic : Doing::write, copy.code);
  });
  stores[me.index].copies.push_back(copy);
}

void add_floats(char* to, const char* from) {
  float sum[4], terms[4];
  std::memcpy(sum, to, sizeof(sum));
  std::memcpy(terms, from, sizeof(terms));
  for (int i = 0; i < 4; ++i) sum[i] += terms[i];
  std::memcpy(to, sum, sizeof(sum));
}

void end_store(Thread& thread, const BoxCopy& store) {
  carry_out(store);
  has_waited(thread, store_actor(thread), store.time);
}

}  // namespace

TensorMap tensor_map(const void* data, int element_bytes, int rank, const int64_t* sizes, const int64_t* strides,
                     const int* box, int swizzle) {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("simt: a tensor map with " + what); };
  const auto of = [](int i) { return " of dimension " + std::to_string(i); };
  TensorMap map{};
  if (rank < 1 || rank > 5) refuse("0 or more than 5 dimensions");
  if (data == nullptr) refuse("a null address");
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) refuse("an address that is no multiple of 16");
  if (swizzle < 0 || swizzle > 3) refuse("an unknown swizzle");
  map.data = static_cast<const char*>(data);
  map.element_bytes = element_bytes;
  map.rank = rank;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i] * element_bytes;
    map.box[i] = box[i];
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32) refuse("a size" + of(i) + " that is not 1 to 2^32");
    if (box[i] < 1 || box[i] > kMostBox) refuse("a box" + of(i) + " that is not 1 to 256");
    if (i == 0) continue;
    if (strides[i] <= 0 || map.strides[i] >= int64_t{1} << 40) refuse("a stride" + of(i) + " that is not 1 to 2^40");
    if (map.strides[i] % 16 != 0) refuse("a stride" + of(i) + " that is no multiple of 16 bytes");
  }
  if (strides[0] != 1 && sizes[0] > 1) refuse("an innermost stride that is not 1");
  const int row_bytes = box[0] * element_bytes;
  if (row_bytes % 16 != 0) refuse("boxes whose rows are no multiple of 16 bytes");
  if (swizzle != 0 && row_bytes != 16 << swizzle) refuse("boxes whose rows are not as wide as the swizzle");
  return map;
}

void carry_out(const BoxCopy& copy) {
  const int row_bytes = copy.map.box[0] * copy.map.element_bytes;
  const bool loads = copy.what == Moves::load;
  const uintptr_t begin = shared_of(rank_of_shared(copy.shared));
  if (loads) set_in_flight(copy.shared, copy.bytes, false);
  for_rows(copy, [&](int offset, char* data, int bytes, int before) {
    char row[kMostBox * 8] = {};
    const auto chunk = [&](int i) {
      return reinterpret_cast<char*>(swizzled(copy.shared + offset + i - begin, copy.map.swizzle) + begin);
    };
    if (loads) {
      if (bytes > 0) {
        set_read(data, bytes, false);
        std::memcpy(row + before, data, bytes);
      }
      for (int i = 0; i < row_bytes; i += 16) std::memcpy(chunk(i), row + i, 16);
    } else {
      for (int i = 0; i < row_bytes; i += 16) std::memcpy(row + i, chunk(i), 16);
      if (copy.what == Moves::add) add_floats(data, row);
      if (copy.what == Moves::store && bytes > 0) std::memcpy(data, row + before, bytes);
    }
  });
  if (!loads) set_read(reinterpret_cast<void*>(copy.shared), copy.bytes, false);
}

bool find_box_copy(const BoxCopy& copy, uintptr_t address, size_t bytes, bool write, Report& report) {
  const Thread& thread = state.threads[copy.thread];
  const bool in_box = copy.shared < address + bytes && address < copy.shared + copy.bytes;
  if (copy.what == Moves::load && in_box) {
    report.before = side(thread, copy.code, "began a tma_load to");
  } else if (copy.what != Moves::load && in_box && write) {
    report.before = side(thread, copy.code, "began a copy from");
  } else if (copy.what == Moves::load && write) {
    for_rows(copy, [&](int, char* data, int row_bytes, int) {
      const auto from = reinterpret_cast<uintptr_t>(data);
      if (from < address + bytes && address < from + row_bytes) {
        report.before = side(thread, copy.code, "began a tma_load from");
      }
    });
  }
  return report.before.thread >= 0;
}

bool find_store(uintptr_t address, size_t bytes, bool write, Report& report) {
  for (const auto& [thread, mine] : stores) {
    for (const BoxCopy& store : mine.copies) {
      if (find_box_copy(store, address, bytes, write, report)) return true;
    }
  }
  return false;
}

void begin_stores() { stores.clear(); }

int last_to_store(int rank) { return last_storing[rank]; }

Code unfinished_add(int thread) { return state.actors ? stores[thread].unfinished_add : 0; }

void store_thread_exited(Thread& thread) {
  const auto mine = stores.find(thread.index);
  if (mine == stores.end()) return;
  for (const BoxCopy& store : mine->second.copies) {
    Report finding{.kind = Kind::copy_under_way, .now = side(thread, store.code, "began a copy from shared memory")};
    finding.text = "it ends, and has not waited for it: its shared memory may be another block's then";
    report(std::move(finding));
    end_store(thread, store);
  }
  stores.erase(mine);
}

void tma_load(void* shared, const TensorMap& map, void* barrier, const int* at, int rank) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  need_actors();
  check_rank(me, map, rank, code, "in tma_load");
  const BoxCopy copy = checked(me, map, 128 << map.swizzle, shared, at, code, "in tma_load");
  begin_load(me, copy, reinterpret_cast<uintptr_t>(barrier), me.rank, "in tma_load");
}

void tma_load_to(void* shared, const TensorMap& map, void* barrier, const int* at, int rank, int blocks) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const char* did = "in tma_load_to";
  Thread& me = *current;
  need_actors();
  check_rank(me, map, rank, code, did);
  const BoxCopy copy = checked(me, map, 128 << map.swizzle, shared, at, code, did);
  if (blocks == 0) bad_call(me, code, did, "it is for no block");
  for (unsigned left = blocks; left != 0; left &= left - 1) check_block(me, std::countr_zero(left), code, did);
  for (unsigned left = blocks; left != 0; left &= left - 1) {
    begin_load(me, copy, reinterpret_cast<uintptr_t>(barrier), std::countr_zero(left), did);
  }
}

void tma_store(const TensorMap& map, const void* shared, const int* at, int rank) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  need_actors();
  check_rank(me, map, rank, code, "in tma_store");
  BoxCopy copy = checked(me, map, 128 << map.swizzle, shared, at, code, "in tma_store");
  copy.what = Moves::store;
  begin_store(me, copy);
}

void bulk_add(float* to, const float* shared, int bytes) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const char* did = "in bulk_add";
  Thread& me = *current;
  need_actors();
  stop_in_clusters(code, did);
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    bad_call(me, code, did, "the bytes and both addresses are multiples of 16");
  }
  TensorMap map{};
  map.data = reinterpret_cast<const char*>(to);
  map.rank = 2;
  map.element_bytes = 4;
  map.sizes[0] = map.box[0] = 4;
  map.sizes[1] = map.box[1] = bytes / 16;
  map.strides[1] = 16;
  const int begin[2] = {};
  BoxCopy copy = checked(me, map, 16, shared, begin, code, did);
  copy.what = Moves::add;
  begin_store(me, copy);
  note_addition(me, to, bytes, code);
  stores[me.index].unfinished_add = code;
}

void bulk_wait_all() {
  tma_store_wait(0);
  stores[current->index].unfinished_add = 0;
}

void tma_store_commit() {
  need_actors();
  Stores& mine = stores[current->index];
  size_t before = 0;
  for (const size_t count : mine.groups) before += count;
  mine.groups.push_back(mine.copies.size() - before);
}

void tma_store_wait(int groups) {
  need_actors();
  Thread& me = *current;
  Stores& mine = stores[me.index];
  size_t copies = 0, done = 0;
  while (mine.groups.size() - done > static_cast<size_t>(groups)) copies += mine.groups[done++];
  for (size_t i = 0; i < copies; ++i) end_store(me, mine.copies[i]);
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + static_cast<int64_t>(copies));
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<int64_t>(done));
}

}  // namespace simt
