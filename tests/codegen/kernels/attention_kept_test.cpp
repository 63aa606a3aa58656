// Attention over pages and by patterns, against the same in doubles: attention_kept_test [seed] [cases]
#include "attention_case.h"

namespace {

// Spreads the caches over pages in any order, for rows of lengths of their own.
template <class T>
void into_pages(Case<T>& c) {
    Attention& a = c.a;
    c.page_size = pick({64, 64, 128});
    a.page_size = c.page_size;
    i64 most = 0;
    for (i64 b = 0; b < a.batch; b++) {
        c.lengths.push_back(pick({0, 1, 63, 64, a.start, a.start + 70}));
        most = std::max(most, c.lengths.back() + a.queries);
    }
    a.columns = (most + c.page_size - 1) / c.page_size + pick({0, 1});
    i64 pages = a.batch * a.columns + 1;
    for (i64 page = 0; page < a.batch * a.columns; page++) c.table.push_back((i32)page);
    std::shuffle(c.table.begin(), c.table.end(), random_bits);
    c.k_cache = Tensor<T>(pages, a.kv_heads, c.page_size, a.key_width, T(NAN));
    c.v_cache = Tensor<T>(pages, a.kv_heads, c.page_size, a.value_width, T(NAN));
    for (i64 b = 0; b < a.batch; b++)
        for (i64 g = 0; g < a.kv_heads; g++)
            for (i64 j = 0; j < c.lengths[(size_t)b]; j++) {
                for (i64 p = 0; p < a.key_width; p++) c.key(b, g, j)[p] = T(normal());
                for (i64 p = 0; p < a.value_width; p++) c.value(b, g, j)[p] = T(normal());
            }
    c.k_before = c.k_cache, c.v_before = c.v_cache;
    a.table = c.table.data(), a.table_batch = a.columns, a.lengths = c.lengths.data();
    a.keys = a.start = 0;
}

Term any_term() {
    i32 size = (i32)pick({1, 3, 16, 17, 64, 100});
    switch (random_bits() % 7) {
        case 0: return {Keep::window, size, 0, 0};
        case 1: return {Keep::columns, size, 0, 0};
        case 2: return {Keep::rows, size, 0, 0};
        case 3: return {Keep::stride, size, 0, 0};
        case 4: return {Keep::blocks, size, (i32)pick({1, 2, 4}), 0};
        case 5: return {Keep::summary, size, (i32)std::min<i64>(size, pick({1, 2, 5})), 0};
        default: return {Keep::random, size, (i32)pick({1, 3}), (i32)pick({0, 5})};
    }
}

// Terms of each head, or one list for all of them.
template <class T>
void by_patterns(Case<T>& c) {
    bool alike = chance(2);
    for (i64 h = 0; h < c.a.heads; h++) {
        std::vector<Term> list;
        for (i64 n = pick({0, 1, 1, 2, 3}); n > 0; n--) list.push_back(any_term());
        c.terms.push_back(alike && h ? c.terms[0] : list);
    }
    for (const auto& list : c.terms) c.patterns.push_back({list.empty() ? nullptr : list.data(), (i32)list.size()});
    if (alike)
        for (Pattern& pattern : c.patterns) pattern = c.patterns[0];
    c.a.patterns = c.patterns.data();
}

template <class T>
void test_kept(Format format, bool cached) {
    Case<T> c;
    shape_case(c, format, cached);
    Attention& a = c.a;
    bool paged = cached && chance(2);
    if (paged) a.window = 0;
    fill_case(c);
    c.mass.clear();
    if (paged) {
        c.mask.clear(), c.bias = Tensor<float>();
        into_pages(c);
    } else if (cached) {  // a pattern's runs of keys may begin before a window does
        c.k_cache.randomize(0, a.start), c.v_cache.randomize(0, a.start);
        c.k_before = c.k_cache, c.v_before = c.v_cache;
    }
    if (!paged || chance(2)) by_patterns(c);
    point_case(c);
    call(a, c.threads);
    i64 rows = a.batch * a.heads * a.queries, step = std::max<i64>(1, rows / 100);
    for (i64 row = (i64)(random_bits() % (unsigned)step); row < rows; row += step)
        check_row(c, row / a.queries / a.heads, row / a.queries % a.heads, row % a.queries);
    if (cached) check_cache(c);
}

// What is chosen by looking hangs on how floats round: here it is asked whether all of it is weighed means of values.
template <class T>
void test_chosen(Format format) {
    Case<T> c;
    shape_case(c, format, true);
    Attention& a = c.a;
    a.window = 0;
    fill_case(c);
    c.mass.clear();
    bool looks = chance(2), paged = chance(2);  // top; else vertical_slash
    if (paged) {
        c.mask.clear(), c.bias = Tensor<float>();
        into_pages(c);
    }
    if (looks) a.top = pick({16, 32, 64}), a.share = pick({1, 2, 8});
    else a.slash_columns = pick({1, 8, 500}), a.slashes = pick({1, 4, 100});
    Term term = looks ? Term{Keep::top, (i32)a.top, (i32)a.share, 0}
                      : Term{Keep::vertical_slash, (i32)a.slash_columns, (i32)a.slashes, 0};
    c.patterns.assign((size_t)a.heads, Pattern{&term, 1});
    point_case(c);
    a.patterns = c.patterns.data();
    std::vector<float> bounds;
    if (looks) {
        i64 room = paged ? a.page_size : (c.k_cache.shape[2] + a.top - 1) / a.top * a.top;
        a.kb_head = room / a.top * 2 * a.key_width, a.kb_batch = a.kv_heads * a.kb_head;
        bounds.assign((size_t)(c.k_cache.shape[0] * a.kb_batch), 0.0f);
        a.k_bounds = bounds.data();
    }
    call(a, c.threads);
    for (i64 b = 0; b < a.batch; b++)
        for (i64 h = 0; h < a.heads; h++)
            for (i64 i = 0; i < a.queries; i++)
                for (i64 p = 0; p < a.value_width; p++)
                    if (!(std::fabs(c.out.row(b, h, i)[p]) < 10.0f)) fail(c.describe() + ": no mean of values");
    check_cache(c);
}

}  // namespace

int main(int argc, char** argv) {
    random_bits.seed(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1);
    int cases = argc > 2 ? std::atoi(argv[2]) : 500;
    for (int i = 0; i < cases; i++) {
        switch (i % 6) {
            case 0: test_kept<bf16>(Format::bf16, true); break;
            case 1: test_kept<float>(Format::f32, false); break;
            case 2: test_chosen<float>(Format::f32); break;
            case 3: test_chosen<f16>(Format::f16); break;
            default: test_kept<float>(Format::f32, true);
        }
    }
    std::printf("%d cases\n", cases);
}
