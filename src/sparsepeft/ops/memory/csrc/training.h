// SPARTAN's memory in training: each token meets the whole memory, a few tokens at a time, so that states are read and
// written once in each direction.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"
#include "product.h"
#include "threads.h"

// The arguments; `cpu_training.py` mirrors this struct. All tensors are contiguous.
struct Training {
    int64_t tokens, hidden, parents, children, top_k, threads;
    int64_t parts;        // that tokens are divided into for the memory's gradients, which are added up in order
    int64_t is_bfloat16;  // states and their gradients
    double temperature;
    const void* x;                                         // (N, D)
    const float *parent_keys, *child_keys, *child_values;  // (P, D), (P, C, D), (P, C, D)
    float* weights;  // (N, columns): parents' gates and children's attention, which forward leaves for backward
    void* output;    // (N, D), null in backward
    const void* grad_output;
    void* grad_x;  // null where it is not needed, as are the following
    float *grad_parent_keys, *grad_child_keys, *grad_child_values;
};

constexpr int64_t TILE = 48;   // tokens at a time
constexpr int64_t PANEL = 64;  // columns of states that lie together, so that what is multiplied stays in the first cache

// Cells lie in columns: the parents, then the first child of each, then the second, each group in whole vectors. Thus the
// softmax over the few children of a parent is one of vectors. Columns that stand for nobody hold zeros.
INLINE int64_t group_size(int64_t parents) { return round_up(parents, LANES); }

class Cells {
  public:
    explicit Cells(const Training& t)
        : t(t), group(group_size(t.parents)), num_children(t.children * group), num(group + num_children),
          panels((t.hidden + PANEL - 1) / PANEL) {}

    // The number of a panel's columns that are no padding.
    int64_t width(int64_t panel) const { return std::min(PANEL, t.hidden - panel * PANEL); }

    // Where a tensor with a row for each cell keeps that of a column, (P, C, D) or for parents (P, D); null for padding.
    template <class Float>
    Float* row(int64_t column, Float* parents, Float* children) const {
        const int64_t which = column / group, parent = column % group;
        if (parent >= t.parents) return nullptr;
        return which == 0 ? parents + parent * t.hidden : children + (parent * t.children + which - 1) * t.hidden;
    }

    const Training& t;
    const int64_t group, num_children, num, panels;
};

// Rows of cells by panels: (panels, columns, PANEL), or crossed (panels, PANEL, columns). Without `parents` only children.
class Packed {
  public:
    Packed(const Cells& cells, const float* parents, const float* children, bool crossed, Parallel parallel)
        : rows(parents ? cells.num : cells.num_children), storage(cells.panels * rows * PANEL) {
        const int64_t first = cells.num - rows;
        run_threads(parallel, std::min(cells.t.threads, cells.panels), [&](std::atomic<int64_t>& next, int64_t) {
            for (int64_t panel; (panel = next++) < cells.panels;)
                for (int64_t r = 0; r < rows; r++) {
                    const float* from = cells.row(first + r, parents, children);
                    float* to = storage.data() + panel * rows * PANEL + (crossed ? r : r * PANEL);
                    if (from)
                        for (int64_t d = 0; d < cells.width(panel); d++)
                            to[crossed ? d * rows : d] = from[panel * PANEL + d];
                }
        });
    }

    const float* operator[](int64_t panel) const { return storage.data() + panel * rows * PANEL; }

    const int64_t rows;

  private:
    std::vector<float> storage;
};

// States of up to TILE tokens in float32, by panels: (panels, TILE, PANEL).
class States {
  public:
    explicit States(const Cells& cells) : cells(cells), storage(cells.panels * TILE * PANEL) {}

    float* operator[](int64_t panel) { return storage.data() + panel * TILE * PANEL; }

    void read(const void* from, int64_t first, int64_t count) {
        each_piece(first, count, [&](float* piece, int64_t at, int64_t size) {
            if (cells.t.is_bfloat16) widen(static_cast<const uint16_t*>(from) + at, size, piece);
            else std::memcpy(piece, static_cast<const float*>(from) + at, size * sizeof(float));
        });
    }

    void write(void* to, int64_t first, int64_t count) {
        each_piece(first, count, [&](const float* piece, int64_t at, int64_t size) {
            if (cells.t.is_bfloat16) narrow(piece, size, static_cast<uint16_t*>(to) + at);
            else std::memcpy(static_cast<float*>(to) + at, piece, size * sizeof(float));
        });
    }

  private:
    template <class Use>
    void each_piece(int64_t first, int64_t count, const Use& use) {
        for (int64_t r = 0; r < count; r++)
            for (int64_t panel = 0; panel < cells.panels; panel++)
                use((*this)[panel] + r * PANEL, (first + r) * cells.t.hidden + panel * PANEL, cells.width(panel));
    }

    const Cells& cells;
    std::vector<float> storage;
};

class Forward {
  public:
    Forward(const Cells& cells, const Packed& keys, const Packed& values)
        : c(cells), keys(keys), values(values), x(cells), products(TILE * c.num_children),
          best(round_up(c.t.top_k, LANES)), kept(c.t.top_k) {}

    void run(int64_t first, int64_t count) {
        x.read(c.t.x, first, count);
        float* scores = c.t.weights + first * c.num;
        std::fill(scores, scores + count * c.num, 0.0f);
        for (int64_t panel = 0; panel < c.panels; panel++)
            add_product(count, c.num, c.width(panel), x[panel], PANEL, keys[panel], c.num, scores, c.num);
        for (int64_t r = 0; r < count; r++) weigh(scores + r * c.num, products.data() + r * c.num_children);
        for (int64_t panel = 0; panel < c.panels; panel++)
            add_product(count, PANEL, c.num_children, products.data(), c.num_children, values[panel], PANEL, x[panel],
                        PANEL);
        x.write(c.t.output, first, count);
    }

  private:
    // Turn a token's scores into gates and attention, in place, and into the product of both for each child.
    void weigh(float* scores, float* product) {
        keep_best(scores, c.t.parents, c.t.top_k, best.data(), kept.data());
        softmax(best.data(), c.t.top_k);
        std::fill(scores, scores + c.group, 0.0f);
        for (int64_t i = 0; i < c.t.top_k; i++) scores[kept[i]] = best[i];
        const float sharpness = static_cast<float>(1 / c.t.temperature);
        for (int64_t p = 0; p < c.group; p += LANES) {
            const vec gate = load(scores + p);
            float *attention = scores + c.group + p, *to = product + p;
            vec largest = load(attention), total = {};
            for (int64_t at = c.group; at < c.num_children; at += c.group) {
                const vec score = load(attention + at);
                largest = select(score > largest, score, largest);
            }
            for (int64_t at = 0; at < c.num_children; at += c.group) {
                const vec part = exp((load(attention + at) - largest) * sharpness);
                store(attention + at, part);
                total += part;
            }
            for (int64_t at = 0; at < c.num_children; at += c.group) {
                const vec part = select(gate == 0.0f, vec{}, load(attention + at) / total);
                store(attention + at, part);
                store(to + at, gate * part);
            }
        }
    }

    const Cells& c;
    const Packed &keys, &values;
    States x;
    std::vector<float> products, best;
    std::vector<int64_t> kept;
};

class Backward {
  public:
    Backward(const Cells& cells, const Packed& keys, const Packed& values)
        : c(cells), keys(keys), values(values), grad(cells), x(cells), agreements(TILE * c.num_children),
          grad_scores(TILE * c.num), read(c.group) {}

    // Write the gradient of x, and add those of the memory to `grad_keys` and `grad_values`, laid out as `Packed` rows.
    void run(int64_t first, int64_t count, float* grad_keys, float* grad_values) {
        const int64_t cells = c.num, children = c.num_children;
        grad.read(c.t.grad_output, first, count);
        std::fill(agreements.begin(), agreements.end(), 0.0f);
        for (int64_t panel = 0; panel < c.panels; panel++)
            add_product(count, children, c.width(panel), grad[panel], PANEL, values[panel], children,
                        agreements.data(), children);
        for (int64_t r = 0; r < count; r++)
            derive(c.t.weights + (first + r) * cells, agreements.data() + r * children, grad_scores.data() + r * cells);
        if (grad_keys) {
            x.read(c.t.x, first, count);
            for (int64_t panel = 0; panel < c.panels; panel++) {
                add_product<true>(cells, PANEL, count, grad_scores.data(), cells, x[panel], PANEL,
                                  grad_keys + panel * cells * PANEL, PANEL);
                add_product<true>(children, PANEL, count, agreements.data(), children, grad[panel], PANEL,
                                  grad_values + panel * children * PANEL, PANEL);
            }
        }
        if (c.t.grad_x) {
            for (int64_t panel = 0; panel < c.panels; panel++)
                add_product(count, PANEL, cells, grad_scores.data(), cells, keys[panel], PANEL, grad[panel], PANEL);
            grad.write(c.t.grad_x, first, count);
        }
    }

  private:
    // With a_c = G . v_c and u = sum_c attention_c a_c, softmax's own derivative gives the gradients of scores
    //   gate attention (a - u) / temperature  of a child,   gate (u - sum_q gate_q u_q)  of a parent.
    // `agreements`, a, become what weighs G in the gradient of the values.
    void derive(const float* weights, float* agreements, float* grad_scores) {
        const float *attention = weights + c.group, sharpness = static_cast<float>(1 / c.t.temperature);
        vec gated = {};
        for (int64_t p = 0; p < c.group; p += LANES) {
            vec u = {};
            for (int64_t at = p; at < c.num_children; at += c.group) u += load(attention + at) * load(agreements + at);
            store(read.data() + p, u);
            gated += load(weights + p) * u;
        }
        const float mean = sum(gated);
        for (int64_t p = 0; p < c.group; p += LANES) {
            const vec gate = load(weights + p), u = load(read.data() + p);
            store(grad_scores + p, gate * (u - mean));
            for (int64_t at = p; at < c.num_children; at += c.group) {
                const vec weight = gate * load(attention + at);
                store(grad_scores + c.group + at, weight * (load(agreements + at) - u) * sharpness);
                store(agreements + at, weight);
            }
        }
    }

    const Cells& c;
    const Packed &keys, &values;
    States grad, x;
    std::vector<float> agreements, grad_scores, read;
};

INLINE void train_forward(const Training& t, Parallel parallel) {
    const Cells cells(t);
    const Packed keys(cells, t.parent_keys, t.child_keys, true, parallel);
    const Packed values(cells, nullptr, t.child_values, false, parallel);
    const int64_t tiles = (t.tokens + TILE - 1) / TILE;
    run_threads(parallel, std::min(t.threads, tiles), [&](std::atomic<int64_t>& next, int64_t) {
        Forward forward(cells, keys, values);
        for (int64_t tile; (tile = next++) < tiles;)
            forward.run(tile * TILE, std::min(TILE, t.tokens - tile * TILE));
    });
}

INLINE void train_backward(const Training& t, Parallel parallel) {
    const Cells cells(t);
    const Packed keys(cells, t.parent_keys, t.child_keys, false, parallel);
    const Packed values(cells, nullptr, t.child_values, true, parallel);
    const int64_t tiles = (t.tokens + TILE - 1) / TILE, parts = std::min(t.parts, tiles);
    const bool needs_memory = t.grad_parent_keys != nullptr;
    const int64_t keys_size = cells.panels * cells.num * PANEL, values_size = cells.panels * cells.num_children * PANEL;
    std::vector<float> sums(needs_memory ? parts * (keys_size + values_size) : 0);
    const auto sums_of = [&](int64_t part) { return sums.data() + part * (keys_size + values_size); };
    run_threads(parallel, std::min(t.threads, parts), [&](std::atomic<int64_t>& next, int64_t) {
        Backward backward(cells, keys, values);
        for (int64_t part; (part = next++) < parts;)
            for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; tile++)
                backward.run(tile * TILE, std::min(TILE, t.tokens - tile * TILE), needs_memory ? sums_of(part) : nullptr,
                             needs_memory ? sums_of(part) + keys_size : nullptr);
    });
    if (!needs_memory) return;
    // Add up the parts, always in the same order, whichever thread had which.
    const auto collect = [&](int64_t rows, int64_t row, int64_t offset, float* to) {
        for (int64_t panel = 0; to && panel < cells.panels; panel++)
            for (int64_t d = 0; d < cells.width(panel); d++) {
                float total = 0;
                for (int64_t part = 0; part < parts; part++)
                    total += sums_of(part)[offset + (panel * rows + row) * PANEL + d];
                to[panel * PANEL + d] = total;
            }
    };
    run_threads(parallel, std::min(t.threads, cells.num), [&](std::atomic<int64_t>& next, int64_t) {
        for (int64_t column; (column = next++) < cells.num;) {
            collect(cells.num, column, 0, cells.row(column, t.grad_parent_keys, t.grad_child_keys));
            if (column >= cells.group)
                collect(cells.num_children, column - cells.group, keys_size,
                        cells.row<float>(column, nullptr, t.grad_child_values));
        }
    });
}
