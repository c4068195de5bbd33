/* Week 5. The ids of many pieces of text in one call: each byte becomes its token, and then the pair of
   neighbours of the lowest rank is merged, the leftmost of several, until none is left that may be merged.
   BPETokenizer does the same in Python, piece by piece, and is what this is tested against. piece_encoder.py
   calls the two functions that are not static.
*/

#include <stdint.h>

enum { LONGEST = 4 * 200 }; /* bytes of a piece; piece_encoder.py has the characters */

static const int32_t NEVER = INT32_MAX; /* the rank of a pair that is not merged */

/* A place of the hash table. */
typedef struct {
    int32_t left, right; /* the pair; left is -1 where the place is free */
    int32_t rank;
    int32_t merged; /* the token that it becomes */
} place;

/* The pairs that may be merged lie in a hash table of 2^bits places. A pair whose place is taken by another one
   has the next that is free; half of them are free at least, so the search is short. */
typedef struct {
    place *table;
    int32_t bits;
    int32_t id_of_byte[256];
} vocabulary;

/* Where a pair is, or the free place where it would be. */
static place *find(const vocabulary *v, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)left << 32 | (uint32_t)right;
    /* 2^64 divided by the golden ratio: the upper bits of a number times it are spread evenly (Knuth). */
    uint64_t at = key * 0x9E3779B97F4A7C15u >> (64 - v->bits);
    uint64_t last = ((uint64_t)1 << v->bits) - 1;
    while (v->table[at].left != -1 && (v->table[at].left != left || v->table[at].right != right))
        at = (at + 1) & last; /* behind the last place comes the first */
    return &v->table[at];
}

static int32_t rank_of(const vocabulary *v, int32_t left, int32_t right) {
    const place *found = find(v, left, right);
    return found->left == -1 ? NEVER : found->rank;
}

/* Puts pairs into the table, whose places are all free. */
void fill_table(const vocabulary *v, const place *pairs, int64_t n_pairs) {
    for (int64_t i = 0; i < n_pairs; i++)
        *find(v, pairs[i].left, pairs[i].right) = pairs[i];
}

/* Merges the n tokens of a piece in place, and returns how many are left. */
static int merge(const vocabulary *v, int32_t *ids, int n) {
    int32_t ranks[LONGEST]; /* that of ids[i] and ids[i + 1] at i */
    for (int i = 0; i < n - 1; i++)
        ranks[i] = rank_of(v, ids[i], ids[i + 1]);
    while (n > 1) {
        int at = 0;
        for (int i = 1; i < n - 1; i++)
            if (ranks[i] < ranks[at])
                at = i;
        if (ranks[at] == NEVER)
            break;
        ids[at] = find(v, ids[at], ids[at + 1])->merged;
        n--;
        for (int i = at + 1; i < n; i++)
            ids[i] = ids[i + 1];
        for (int i = at; i < n - 1; i++)
            ranks[i] = ranks[i + 1];
        if (at > 0)
            ranks[at - 1] = rank_of(v, ids[at - 1], ids[at]);
        if (at < n - 1)
            ranks[at] = rank_of(v, ids[at], ids[at + 1]);
    }
    return n;
}

/* Writes the ids of n_pieces pieces one after the other, and returns how many those are.

   text: the pieces in UTF-8, with no byte between them and a zero byte behind the last. lengths: how many
   characters each has; then, how many ids. ids: room for one for each byte. */
int64_t encode_pieces(const vocabulary *v, const unsigned char *text, int32_t *lengths, int64_t n_pieces,
                      int32_t *ids) {
    int32_t *end = ids;
    for (int64_t i = 0; i < n_pieces; i++) {
        int n = 0;
        for (int32_t character = 0; character < lengths[i]; character++)
            do
                end[n++] = v->id_of_byte[*text++];
            while ((*text & 0xC0) == 0x80); /* until another character begins */
        lengths[i] = merge(v, end, n);
        end += lengths[i];
    }
    return end - ids;
}
