# SPDX-License-Identifier: Apache-2.0
"""Races in shared memory, found while a Hopper operator runs on the CPU (simulate.py): what must have happened before each
access, and by which barrier.

Every thread has a vector clock. What copies in its name, TMA and st.async, is an actor of its own for every mbarrier that it
tells. A word knows its last writer and who has read it since.

    release, acquire   arrivals at an mbarrier and the wait for its phase; CTA, cluster and named barriers
    TMA, st.async      write when they are issued (so all readers must have let go) and are seen by who waits for the mbarrier
    cp.async           writes of its thread, which its mbarrier's arrival releases
    wgmma              reads tokens from its issue to the wait_group that retires its group
    a warp             its lanes meet where an instruction wants all of them: wgmma, wait_group, stmatrix, syncwarp

Two accesses of which one writes are a race unless one has happened before the other, whatever the order in which the
simulation made them. But what a barrier waits for follows one order of arrivals: ``tvmmoe_starve`` lets one warpgroup of
every CTA run only when nothing else can (-1: none). Races between lanes of a warp are only found where the lanes do not meet
in between; accesses to global memory are not watched, nor is what fences between TMA and other accesses are for.
"""

import re

WATCH = r"""
#include <array>
#include <map>
namespace race {
using Clock = std::vector<uint32_t>;
constexpr uint32_t kPending = ~0u;  // a read that has not retired
using Bytes = uint8_t;  // of a word, a bit each
struct Reader { int who; uint32_t when; Bytes bytes; };
struct Word { int writer = -1; uint32_t when = 0; Bytes bytes = 0; std::vector<Reader> readers; };
struct Meeting { std::array<Clock, 2> clocks; std::array<int, 2> generations{-1, -1}; };
inline std::vector<Clock> clocks, warp_clocks;
inline std::vector<Word> words;
inline size_t words_per_cta;
inline std::map<const void*, Meeting> meetings;
struct Phases { Clock pending; std::array<Clock, 2> done; };
inline std::map<uint64_t, Phases> phases;
using Group = std::vector<size_t>;  // words
inline std::map<int, std::vector<Group>> groups;  // of wgmma, by a warp's first thread; the last one is still open
inline std::map<uint64_t, int> engines;  // by mbarrier
inline std::vector<uint32_t> engine_times;
inline long count, num_checks;
inline int me() { return int(sim::self - sim::fibers.data()); }
inline int engine_of(uint64_t barrier) {
  const auto [at, is_new] = engines.emplace(barrier, int(engines.size()));
  if (is_new) engine_times.push_back(0);
  return int(sim::fibers.size()) + at->second;
}
inline bool is_engine(int who) { return who >= int(sim::fibers.size()); }
inline uint32_t seen(const Clock& clock, int who) { return size_t(who) < clock.size() ? clock[who] : 0; }
inline void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}
inline void begin() {
  const size_t total = sim::fibers.size();
  clocks.assign(sim::fibers.size(), Clock(total));
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i][i] = 1;
  warp_clocks.assign(sim::fibers.size() / 32 + 1, Clock(total));
  words_per_cta = sim::smem_stride / 4;
  words.assign(words_per_cta * sim::num_ctas, {});
  meetings.clear(), phases.clear(), groups.clear(), engines.clear(), engine_times.clear();
}
inline bool installed = (sim::on_begin = begin, true);
inline void report(const char* what, size_t word, int other) {
  if (++count <= 5)
    fprintf(stderr, "race: %s word %zu: thread %d and %d\n", what, word, me(), other);
}
inline size_t word_of(int rank, uint32_t at) { return rank * words_per_cta + at / 4; }
inline void read_word(size_t index, const Clock& clock, int who, uint32_t when, Bytes bytes = 15) {
  Word& w = words[index];
  ++num_checks;
  if (w.writer >= 0 && w.writer != who && w.bytes & bytes && seen(clock, w.writer) < w.when)
    report("read of a write not waited for,", index, w.writer);
  for (Reader& r : w.readers)
    if (r.who == who) { r.when = when, r.bytes |= bytes; return; }
  w.readers.push_back({who, when, bytes});
}
// Of parts of a word only the last writer is remembered.
inline void write_word(size_t index, const Clock& clock, int who, uint32_t when, Bytes bytes = 15) {
  Word& w = words[index];
  ++num_checks;
  if (w.writer >= 0 && (w.writer != who || is_engine(who)) && w.bytes & bytes && seen(clock, w.writer) < w.when)
    report("two writes of", index, w.writer);
  for (const Reader& r : w.readers)
    if (r.bytes & bytes && (r.when == kPending || (r.who != who && seen(clock, r.who) < r.when)))
      report("write under a read of", index, r.who);
  w.writer = who, w.when = when, w.bytes = bytes;
  if (bytes == 15) w.readers.clear();
}
inline Bytes bytes_of(uint32_t at, int bytes) { return bytes < 4 ? ((1 << bytes) - 1) << at % 4 : 15; }
inline void read(uint32_t at, int bytes) {
  const int who = me();
  for (uint32_t b = at / 4 * 4; b < at + bytes; b += 4)
    read_word(word_of(sim::self->rank, b), clocks[who], who, clocks[who][who], bytes_of(at, bytes));
}
inline void write(uint32_t at, int bytes) {
  const int who = me();
  for (uint32_t b = at / 4 * 4; b < at + bytes; b += 4)
    write_word(word_of(sim::self->rank, b), clocks[who], who, clocks[who][who], bytes_of(at, bytes));
}
// In this thread's name, by the engine that tells ``barrier``; returns its time.
inline uint32_t copy(int rank, uint32_t at, uint32_t bytes, uint64_t barrier) {
  const int who = engine_of(barrier);
  const uint32_t when = ++engine_times[who - sim::fibers.size()];
  for (uint32_t b = at; b < at + bytes; b += 4) write_word(word_of(rank, b), clocks[me()], who, when);
  return when;
}
inline void copied(uint64_t barrier, uint32_t when) {
  Clock& pending = phases[barrier].pending;
  const size_t who = engine_of(barrier);
  if (pending.size() <= who) pending.resize(who + 1);
  pending[who] = std::max(pending[who], when);
}
inline void release(uint64_t barrier) {
  join(phases[barrier].pending, clocks[me()]);
  ++clocks[me()][me()];
}
inline void complete(uint64_t barrier, unsigned phase) {
  Phases& p = phases[barrier];
  p.done[phase & 1] = std::move(p.pending);
  p.pending.clear();
}
inline void acquire(uint64_t barrier, unsigned phase) { join(clocks[me()], phases[barrier].done[phase & 1]); }
template <class Wait> void meet(const void* at, int generation, Wait wait) {
  Meeting& m = meetings[at];
  const int slot = generation & 1;
  if (m.generations[slot] != generation) m.generations[slot] = generation, m.clocks[slot].clear();
  join(m.clocks[slot], clocks[me()]);
  ++clocks[me()][me()];
  wait();
  join(clocks[me()], meetings[at].clocks[slot]);
}
// An element of an array in shared memory; other arrays are not watched.
template <class T> struct Element {
  T* at;
  bool is_shared() const {
    const char* begin = sim::shared_of(0);
    return (const char*)at >= begin && (const char*)at < begin + sim::smem_stride * sim::num_ctas;
  }
  uint32_t place() const { return uint32_t((const char*)at - sim::shared()); }
  operator T() const { if (is_shared()) read(place(), sizeof(T)); return *at; }
  T operator=(T value) const { if (is_shared()) write(place(), sizeof(T)); return *at = value; }
  T operator=(const Element& other) const { return *this = T(other); }
  T* operator&() const { return at; }
};
template <class T> T max(T a, Element<T> b) { return std::max(a, T(b)); }
template <class T> T max(Element<T> a, T b) { return std::max(T(a), b); }
template <class T> T min(T a, Element<T> b) { return std::min(a, T(b)); }
template <class T> T min(Element<T> a, T b) { return std::min(T(a), b); }
template <class T> struct Array {
  T* begin;
  template <class Index> Element<T> operator[](Index i) const { return {begin + i}; }
};
template <class T> Array<T> array(const void* begin) { return {(T*)begin}; }
template <class Wait> void meet_in_warp(Wait wait) {
  Clock& together = warp_clocks[me() / 32];
  join(together, clocks[me()]);
  wait();
  join(clocks[me()], together);
}
inline bool is_leader() { return me() % 32 == 0; }
inline void wgmma_read(uint32_t at) {  // 4 bytes, by the warp's first lane, until the group retires
  const int who = me() / 32 * 32;
  const size_t index = word_of(sim::self->rank, at);
  read_word(index, clocks[who], who, kPending);
  auto& mine = groups[who];
  if (mine.empty()) mine.emplace_back();
  mine.back().push_back(index);
}
inline void commit() {
  if (is_leader()) groups[me()].emplace_back();  // which has read something
}
inline void retire(int left) {
  if (!is_leader()) return;
  auto& mine = groups[me()];
  for (; int(mine.size()) > left + 1; mine.erase(mine.begin()))
    for (size_t index : mine.front())
      for (Reader& r : words[index].readers)
        if (r.who == me()) r.when = clocks[me()][me()];
}
}  // namespace race
extern "C" __attribute__((visibility("default"))) long tvmmoe_races() { return race::count; }
extern "C" __attribute__((visibility("default"))) long tvmmoe_checks() { return race::num_checks; }
extern "C" __attribute__((visibility("default"))) void tvmmoe_starve(int warpgroup) { sim::starved = warpgroup; }
"""
IGNORE = r"""
namespace race {
template <class... A> void complete(A...) {}
template <class... A> void release(A...) {}
template <class... A> void acquire(A...) {}
template <class... A> int copy(A...) { return 0; }
template <class... A> void copied(A...) {}
template <class Wait> void meet(const void*, int, Wait wait) { wait(); }
template <class... A> void write(A...) {}
template <class... A> void wgmma_read(A...) {}
template <class... A> void retire(A...) {}
inline void commit() {}
template <class Wait> void meet_in_warp(Wait wait) { wait(); }
inline bool is_leader() { return false; }
}  // namespace race
"""
_SIZES = {"u8": 1, "b16": 2, "u16": 2, "b32": 4, "f32": 4, "v2_b32": 8, "v4_b32": 16}


def watched(instructions: str) -> str:
    """Both simulators' instructions, with what loads, stores and cp.async do to shared memory."""

    def and_report(match: re.Match) -> str:
        return f"{match[0]} race::{'read' if match[2] == 'ld' else 'write'}(p, {_SIZES[match[3]]});"

    text, count = re.subn(r"(void (ld|st)_shared_(\w+)\([^)]*\bp\b[^)]*\) \{)", and_report, instructions)
    assert count >= 10, count
    copy = "void cp_async_ca_shared_global(uint32_t to, const void* from, uint32_t bytes, int size) {"
    assert copy in text
    matrices = "simulate: misaligned ldmatrix\\n\"), abort();"  # every lane gives the address of a row
    assert text.count(matrices) == 1
    return text.replace(copy, copy + " race::write(to, size);").replace(matrices, matrices + " race::read(p, 16);")


def watched_arrays(kernels: str) -> str:
    """Kernels whose accesses by index are watched."""
    return re.sub(r"\(\((\w+)\*\)(\w+)\)\[", r"race::array<\1>(\2)[", kernels)
