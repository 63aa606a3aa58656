// What happens between two steps of greedy decoding, against plain loops. greedy_test [seed] [cases]
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "greedy.h"

using namespace slim;

namespace {

using Random = std::mt19937;

i64 uniform(Random& random, i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(random); }

template <class T>
i64 plain_argmax(const std::vector<T>& x) {
    i64 best = 0;
    for (i64 i = 0; i < (i64)x.size(); i++) {
        if ((float)x[i] != (float)x[i]) return i;
        if ((float)x[i] > (float)x[best]) best = i;
    }
    return best;
}

template <class T>
void check_argmax(Random& random) {
    std::vector<T> x(uniform(random, 1, 1000));
    i64 kind = uniform(random, 0, 4);
    for (T& number : x) number = (T)(float)uniform(random, -9, kind == 0 ? 9 : 900);  // few numbers: many equal ones
    if (kind == 1) x[uniform(random, 0, x.size() - 1)] = (T)std::numeric_limits<float>::quiet_NaN();
    if (kind == 2) x.assign(x.size(), (T)-INFINITY);
    if (kind == 3) x[uniform(random, 0, x.size() - 1)] = (T)INFINITY;
    if (argmax(x.data(), x.size()) != plain_argmax(x)) std::printf("argmax of %zu, kind %ld\n", x.size(), (long)kind), std::exit(1);
}

void expect(bool holds, const char* what) {
    if (!holds) std::printf("%s\n", what), std::exit(1);
}

// Steps whose logits are drawn here: rows that end go on with padding, positions and masks grow by one.
void check_steps(Random& random) {
    i64 batch = uniform(random, 1, 5), vocabulary = uniform(random, 3, 40), steps = uniform(random, 1, 12);
    i64 held = uniform(random, 0, 9), capacity = held + steps;
    std::vector<float> logits(batch * vocabulary);
    std::vector<i64> tokens(batch, -1), positions(batch, held - 1), ends{1, 2}, chosen(steps * batch, -7);
    std::vector<u8> mask(batch * capacity), seen(batch * capacity), finished(batch), ended(batch);
    for (u8& visible : mask) visible = uniform(random, 0, 1);
    bool counts = uniform(random, 0, 1);
    Greedy loop{};
    loop.steps = steps, loop.batch = batch, loop.vocabulary = vocabulary, loop.capacity = capacity;
    loop.end_count = 2, loop.mask_index = 1, loop.length = 0, loop.pad = 77;
    loop.logits = logits.data(), loop.format = Format::f32, loop.tokens = tokens.data();
    loop.positions = counts ? positions.data() : nullptr;
    loop.mask = mask.data(), loop.seen = seen.data(), loop.ends = ends.data(), loop.finished = finished.data();
    loop.chosen = chosen.data();
    void* io[2] = {};
    i64 dims[1] = {held};
    Team team;
    for (bool all = false; loop.made < steps && !all;) {
        loop.begin(io, dims);
        i64 keys = held + loop.made + 1;
        expect(dims[0] == keys, "the number of keys");
        for (i64 row = 0; row < batch; row++)
            for (i64 k = 0; k < keys; k++)
                expect(static_cast<u8*>(io[1])[row * keys + k] == mask[row * capacity + k], "a mask");
        for (float& logit : logits) logit = (float)uniform(random, 0, 50);
        team.begin(2);
        auto choose = [&](int id) {
            Thread thread{team, id};
            loop.choose(thread);
        };
        std::thread other(choose, 1);
        choose(0);
        other.join();
        all = loop.end();
        bool every = true;
        for (i64 row = 0; row < batch; row++) {
            std::vector<float> own(logits.begin() + row * vocabulary, logits.begin() + (row + 1) * vocabulary);
            i64 wanted = ended[row] ? 77 : plain_argmax(own);
            expect(tokens[row] == wanted && chosen[(loop.made - 1) * batch + row] == wanted, "a token");
            ended[row] |= wanted == 1 || wanted == 2;
            every &= ended[row] != 0;
            expect(positions[row] == held - 1 + (counts ? loop.made : 0), "a position");
        }
        expect(all == every, "whether all rows have ended");
    }
}

}  // namespace

int main(int count, char** arguments) {
    Random random(count > 1 ? std::atoi(arguments[1]) : 1);
    for (int i = 0, cases = count > 2 ? std::atoi(arguments[2]) : 100; i < 10 * cases; i++) {
        check_argmax<float>(random);
        check_argmax<bf16>(random);
        check_argmax<f16>(random);
        check_steps(random);
    }
}
