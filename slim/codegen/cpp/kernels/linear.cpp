// y = x W^T: cuts the work, prepares the input, and hands results out.
#include "gemm.h"
#include "gemv.h"
#include "kernels.h"

namespace slim {
namespace {

constexpr i64 FEW_ROWS = 16;              // up to here weights are read once for all rows
constexpr i64 CHUNK_ROWS = 512;           // rows at once: bounds the scratch memory
constexpr i64 OWN_NUMBERS = 8192;         // an input this small every thread prepares for itself: a barrier costs more
constexpr i64 PIECE_BYTES = 128 * 1024;   // of weights, for a thread at a time

template <class Predicate>
bool any_weight(const Linear& args, Predicate&& holds) {
    bool any = false;
    for_each_weight(args, [&](const Matrix& w) { any |= holds(w.format); });
    return any;
}

bool few(i64 rows) { return rows <= FEW_ROWS; }
bool prepared_by_each(i64 rows, i64 n) { return few(rows) && (rows == 1 || rows * n <= OWN_NUMBERS); }

// -- scratch ----------------------------------------------------------------------------------------------------------

struct Scratch {
    i64 input_bytes, buffer_bytes, thread_bytes;
    bool own;  // every thread has an input of its own

    Scratch(i64 rows, i64 n) {
        own = prepared_by_each(rows, n);
        i64 chunk = ceil_div(rows, ceil_div(rows, CHUNK_ROWS));
        input_bytes = InputLayout(chunk, n).total;
        buffer_bytes = row_buffer_bytes(n);
        thread_bytes = buffer_bytes + (few(rows) ? 0 : (i64)sizeof(GemmBuffers)) + (own ? input_bytes : 0);
    }
    i64 total(int threads) const { return threads * thread_bytes + (own ? 0 : input_bytes); }
    u8* input(void* scratch, const Thread& thread) const {
        u8* base = static_cast<u8*>(scratch);
        return own ? buffer(scratch, thread) + buffer_bytes : base;
    }
    u8* buffer(void* scratch, const Thread& thread) const {
        return static_cast<u8*>(scratch) + (own ? 0 : input_bytes) + thread.id * thread_bytes;
    }
    GemmBuffers& gemm(void* scratch, const Thread& thread) const {
        return *reinterpret_cast<GemmBuffers*>(buffer(scratch, thread) + buffer_bytes);
    }
};

// -- the input --------------------------------------------------------------------------------------------------------

Input make_input(const Linear& args, i64 rows, u8* memory) {
    InputLayout layout(rows, args.n);
    bool gemv = few(args.rows);
    bool floats = any_weight(args, [](Format format) { return !is_packed(format); });
    bool wide = any_weight(args, is_bytes);
    bool nibbles = any_weight(args, [](Format format) { return is_packed(format) && !is_bytes(format); });
    bool words = WIDENS && !gemv && wide, bytes = nibbles || (wide && !words);
    Input in(Tiles(rows, gemv ? GEMV_HEIGHT : TILE_HEIGHT), Grouping(args));
    in.n = args.n;
    in.padded = padded_width(args.n);
    in.by_row = gemv;
    in.clips = args.step && args.clips;
    in.floats = floats ? reinterpret_cast<float*>(memory + layout.floats) : nullptr;
    in.bytes = bytes ? reinterpret_cast<u32*>(memory + layout.bytes) : nullptr;
    in.words = words ? reinterpret_cast<u32*>(memory + layout.words) : nullptr;
    in.scales = reinterpret_cast<float*>(memory + layout.scales);
    in.starts = reinterpret_cast<i32*>(memory + layout.starts);
    return in;
}

void prepare(Thread& thread, const Linear& args, const Scratch& scratch, const Input& in, i64 first) {
    void* buffer = scratch.buffer(args.scratch, thread);
    auto prepare_rows = [&](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) prepare_row(in, args, first, r, buffer);
    };
    if (scratch.own) return prepare_rows(0, in.tiles.rows);
    thread.barrier();  // others may still read what lies there
    i64 piece = in.tiles.rows / (4 * thread.team.size);
    thread.share(in.tiles.rows, piece > 0 ? piece : 1, prepare_rows);
    thread.barrier();
}

// -- the results ------------------------------------------------------------------------------------------------------

// Hands out results[lane][row][column], lanes `lane_stride` and rows `stride` numbers apart.
void hand_out(const Part& part, i64 first_row, i64 rows, i64 column, i64 columns, const float* results, i64 lane_stride,
              i64 stride) {
    i64 rest = part.lanes[0]->m - column, count = columns < rest ? columns : rest;
    for (i64 r = 0; r < rows; r++) {
        const float* y[2] = {results + r * stride, results + lane_stride + r * stride};
        part.store(part.env, first_row + r, column, count, y);
    }
}

i64 weight_bytes(const Matrix& w) {
    constexpr i64 bits[] = {32, 16, 16, 8, 4, 3, 4, 8};
    return w.m * w.n * bits[(int)w.format] / 8;
}

// Panels that a thread takes at a time: groups of those that are read side by side, but for the end of its part.
i64 piece_panels(const Part& part, i64 panels, int threads) {
    i64 bytes = 0;
    for (i64 l = 0; l < part.lane_count; l++) bytes += weight_bytes(*part.lanes[l]);
    i64 by_size = round_up(PIECE_BYTES * panels / (bytes + 1) + 1, MOST_STREAMS), by_threads = ceil_div(panels, threads);
    return by_size < by_threads ? by_size : by_threads;
}

void multiply_few(Thread& thread, const Linear& args, const Part& part, const Input& in) {
    constexpr i64 RUN = RUN_COLUMNS / PANEL;
    i64 panels = ceil_div(part.lanes[0]->m, PANEL);
    thread.share(panels, piece_panels(part, panels, thread.team.size), [&](i64 begin, i64 end) {
        alignas(LINE) float results[2 * FEW_ROWS * RUN_COLUMNS];
        constexpr i64 LANE = FEW_ROWS * RUN_COLUMNS;
        for (; begin < end; begin += RUN) {
            i64 last = begin + RUN < end ? begin + RUN : end;
            for (i64 l = 0; l < part.lane_count; l++) {
                bool more = l + 1 < part.lane_count;
                gemv(*part.lanes[l], in, begin, last, *part.lanes[more ? l + 1 : 0], more ? begin : last,
                     results + l * LANE);
            }
            hand_out(part, 0, args.rows, begin * PANEL, (last - begin) * PANEL, results, LANE, RUN_COLUMNS);
        }
    });
}

// Row blocks: few, so that unpacked weights serve many rows, but enough for all threads to end together.
i64 row_blocks(const Input& in, i64 column_blocks, int threads) {
    i64 blocks = ceil_div(in.tiles.rows, BLOCK_ROWS - TILE_HEIGHT), wanted = ceil_div(4 * threads, column_blocks);
    i64 most = ceil_div(in.tiles.count, 4);
    wanted = wanted < most ? wanted : most;
    return blocks > wanted ? blocks : wanted;
}

void multiply_many(Thread& thread, const Part& part, const Input& in, i64 first_row, GemmBuffers& buffers) {
    constexpr i64 LANE = BLOCK_ROWS * BLOCK_COLUMNS;
    i64 panels = ceil_div(part.lanes[0]->m, PANEL), column_blocks = ceil_div(panels, BLOCK_PANELS);
    i64 blocks = row_blocks(in, column_blocks, thread.team.size);
    thread.share(column_blocks * blocks, 1, [&](i64 begin, i64 end) {
        for (i64 task = begin; task < end; task++) {
            i64 panel = task / blocks * BLOCK_PANELS, block = task % blocks;
            i64 count = panels - panel < BLOCK_PANELS ? panels - panel : BLOCK_PANELS;
            i64 from = block * in.tiles.count / blocks, to = (block + 1) * in.tiles.count / blocks;
            for (i64 l = 0; l < part.lane_count; l++)
                gemm(*part.lanes[l], in, from, to, panel, count, buffers, buffers.results + l * LANE);
            i64 row = in.tiles.begin(from), rows = in.tiles.begin(to) - row;
            hand_out(part, first_row + row, rows, panel * PANEL, count * PANEL, buffers.results, LANE, BLOCK_COLUMNS);
        }
    });
}

}  // namespace

float token_scale(const float* x, i64 n) {
    i64 whole = n / LANES * LANES;
    float rest[LANES] = {};
    std::memcpy(rest, x + whole, (n - whole) * sizeof(float));
    float most = largest_magnitude(x, whole), last = largest_magnitude(rest, LANES);
    float scale = (last > most || last != last ? last : most) / 127.0f;
    return scale < 0x1p-126f ? 0x1p-126f : scale;
}

i64 linear_scratch(i64 rows, i64 n, int threads) { return rows > 0 ? Scratch(rows, n).total(threads) : 0; }

i64 linear_scratch_up_to(i64 rows, i64 n, int threads) {
    i64 chunk = rows < CHUNK_ROWS ? rows : CHUNK_ROWS, bytes = linear_scratch(chunk, n, threads);  // 512 rows in one
    for (i64 fewer = 1; fewer < chunk && few(fewer); fewer++) {  // of which each thread may have its own copy
        i64 own = linear_scratch(fewer, n, threads);
        bytes = own > bytes ? own : bytes;
    }
    return bytes;
}

void linear(Thread& thread, const Linear& args) {
    if (args.rows <= 0) return;
    Scratch scratch(args.rows, args.n);
    i64 chunks = ceil_div(args.rows, CHUNK_ROWS);
    for (i64 c = 0; c < chunks; c++) {
        i64 first = c * args.rows / chunks, rows = (c + 1) * args.rows / chunks - first;
        Input in = make_input(args, rows, scratch.input(args.scratch, thread));
        prepare(thread, args, scratch, in, first);
        for (i64 p = 0; p < args.part_count; p++) {
            if (few(args.rows)) multiply_few(thread, args, args.parts[p], in);
            else multiply_many(thread, args.parts[p], in, first, scratch.gemm(args.scratch, thread));
        }
    }
}

}  // namespace slim
