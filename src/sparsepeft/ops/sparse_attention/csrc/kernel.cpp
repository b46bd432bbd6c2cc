// The functions that Python calls.
#include "block.h"
#include "encode.h"
#include "token.h"

namespace {
// Rows of at most 256 numbers, padded to one of these widths.
template <class Function>
auto with_width(const Problem& p, const Function& function) {
    const int64_t size = std::max(p.head_size, p.value_size);
    if (size <= 16) return function(std::integral_constant<int64_t, 16>{});
    if (size <= 32) return function(std::integral_constant<int64_t, 32>{});
    if (size <= 64) return function(std::integral_constant<int64_t, 64>{});
    if (size <= 96) return function(std::integral_constant<int64_t, 96>{});
    if (size <= 128) return function(std::integral_constant<int64_t, 128>{});
    return function(std::integral_constant<int64_t, 256>{});
}
}  // namespace

extern "C" {

int64_t sparse_attention_scratch_bytes(const Problem* p, int64_t backward) {
    Arena arena{nullptr};
    if (p->block_size) BlockScratch(*p, arena, backward);
    else with_width(*p, [&](auto width) { TokenScratch<decltype(width)::value>(*p, arena, backward); });
    return arena.used;
}

void sparse_attention_run(const Problem* p, int64_t backward) {
    if (p->block_size) run_block(*p, backward);
    else with_width(*p, [&](auto width) { run_token<decltype(width)::value>(*p, backward); });
}

void sparse_attention_encode(const Encoding* e) { encode(*e); }

// The kept keys of every query as one byte per pair: (B, H, Tq, Tk), zeroed before. With null they are selected and not
// written: what selection alone takes.
void sparse_attention_select(const Problem* p, uint8_t* kept) {
    run_threads(p->parallel, p->threads, [&](std::atomic<int64_t>& next, int64_t thread) {
        Arena arena{p->scratch + thread * p->scratch_bytes};
        AnySelector selector(*p, arena);
        float* query = arena.take<float>(p->head_size);
        int32_t* list = arena.take<int32_t>(std::min(p->top_l, p->keys) + AT_ONCE);
        for (int64_t item; (item = next++) < p->batch * p->heads;) {
            const int64_t batch = item / p->heads, head = item % p->heads;
            selector.read(*p, batch, head / (p->heads / p->kv_heads));
            for (int64_t t = 0; t < p->queries; t++) {
                read_rows(p->query, p->dtype, batch, head, t, t + 1, p->head_size, p->head_size, query);
                const int64_t n = selector.keep(*p, batch, head, t, query, list);
                for (int64_t i = 0; kept && i < n; i++) kept[(item * p->queries + t) * p->keys + list[i]] = 1;
            }
        }
    });
}
}
