// The n best paths through a lattice of `beam` slots at `length` positions: recursive enumeration (Jiménez and Marzal 1999,
// "Computing the K shortest paths: a new algorithm and an experimental comparison").
//
// best [length, beam]: score of the best prefix into every slot, up to a constant of each position. A slot that is on a
// path becomes a node, which knows for every source the next prefix that comes through it. The following prefix into a
// node differs from the last one by the source's following prefix, so each path asks one node of every position for one
// prefix more: at most `paths` nodes a position, of `beam` sources each, whatever the scores are.
//
// Of equal paths the one with the lower last slot comes first, then the one with the lower slot before it, and so on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace simctg {

template <class Column>
class BestPaths {
public:
    // column(t, slot, out): out[k] = transition from slot k at t - 1 to `slot` at t, for all k.
    BestPaths(int64_t length, int64_t beam, const float* best, Column column)
        : length_(length), beam_(beam), best_(best), column_(column), places_(static_cast<size_t>((length + 1) * beam), -1),
          edges_(static_cast<size_t>(beam)) {}

    // slots [length, paths], filled with -1 by the caller; position t of path n goes to slots[t * paths + n].
    void write(int64_t paths, int64_t* slots) {
        if (length_ == 0) return;
        const int64_t root = node(length_, 0);
        for (int64_t n = 0; n < paths; ++n) {
            if (n > 0) extend(root);
            if (static_cast<int64_t>(nodes_[static_cast<size_t>(root)].found.size()) <= n) return;
            Prefix prefix = nodes_[static_cast<size_t>(root)].found[static_cast<size_t>(n)];
            for (int64_t t = length_ - 1; t >= 0; --t) {
                slots[t * paths + n] = prefix.source;
                if (t > 0) prefix = nodes_[static_cast<size_t>(node(t, prefix.source))].found[static_cast<size_t>(prefix.rank)];
            }
        }
    }

private:
    struct Source {
        double score;  // of its next prefix, and the way into the node
        float edge;
        int32_t rank;  // of that prefix among those into the source
    };
    struct Prefix {
        double loss;  // to the best prefix into the node
        int32_t source, rank;
    };
    struct Node {
        int64_t t;
        std::vector<Source> sources;
        std::vector<Prefix> found;  // best first
        double best = 0.0;          // what `loss` is counted from
        bool exhausted = false;
    };

    // The node of a slot with its best prefix; position `length` has one, the end, which every last slot leads to.
    int64_t node(int64_t t, int64_t slot) {
        int64_t& place = places_[static_cast<size_t>(t * beam_ + slot)];
        if (place >= 0) return place;
        place = static_cast<int64_t>(nodes_.size());
        nodes_.emplace_back();
        Node& made = nodes_.back();
        made.t = t;
        made.sources.resize(static_cast<size_t>(beam_));
        if (t < length_) {
            column_(t, slot, edges_.data());
        } else {
            std::fill(edges_.begin(), edges_.end(), 0.0f);
        }
        const float* best = best_ + (t - 1) * beam_;
        for (int64_t k = 0; k < beam_; ++k) {
            const float edge = edges_[static_cast<size_t>(k)];
            made.sources[static_cast<size_t>(k)] = {static_cast<double>(best[k]) + static_cast<double>(edge), edge, 0};
        }
        take(made);
        // A slot that scores inf or NaN may have no source worth the name: any path, then.
        if (t < length_ && made.found.empty()) made.found.push_back({0.0, 0, 0});
        return place;
    }

    // Puts the best of the sources among the prefixes found.
    void take(Node& node) {
        double top = -std::numeric_limits<double>::infinity();
        int32_t source = -1;
        for (int64_t k = 0; k < beam_; ++k) {
            const double score = node.sources[static_cast<size_t>(k)].score;
            if (score > top) top = score, source = static_cast<int32_t>(k);  // NaN and -inf never are
        }
        node.exhausted = source < 0;
        if (node.exhausted) return;
        if (node.found.empty()) node.best = top;
        node.found.push_back({node.best - top, source, node.sources[static_cast<size_t>(source)].rank});
    }

    // Finds the prefix that follows the last one of a node. Those that it waits for are on the way of that last one.
    void extend(int64_t index) {
        chain_.clear();
        while (true) {
            Node& waiting = nodes_[static_cast<size_t>(index)];
            if (waiting.exhausted) break;
            chain_.push_back(index);
            const Prefix last = waiting.found.back();
            if (waiting.t == 1) break;  // one prefix comes into a slot of the first position
            index = node(waiting.t - 1, last.source);
            if (static_cast<int64_t>(nodes_[static_cast<size_t>(index)].found.size()) > last.rank + 1) break;
        }
        for (auto at = chain_.rbegin(); at != chain_.rend(); ++at) {
            Node& waiting = nodes_[static_cast<size_t>(*at)];
            const Prefix last = waiting.found.back();
            Source& source = waiting.sources[static_cast<size_t>(last.source)];
            source.rank = last.rank + 1;
            source.score = -std::numeric_limits<double>::infinity();
            if (waiting.t > 1) {
                const int64_t before = places_[static_cast<size_t>((waiting.t - 1) * beam_ + last.source)];
                const std::vector<Prefix>& found = nodes_[static_cast<size_t>(before)].found;
                if (static_cast<int64_t>(found.size()) > source.rank) {
                    source.score = static_cast<double>(best_[(waiting.t - 1) * beam_ + last.source]) -
                                   found[static_cast<size_t>(source.rank)].loss + static_cast<double>(source.edge);
                }
            }
            take(waiting);
        }
    }

    int64_t length_, beam_;
    const float* best_;
    Column column_;
    std::vector<int64_t> places_, chain_;  // of the node of a slot, -1: none
    std::vector<float> edges_;
    std::vector<Node> nodes_;
};

}  // namespace simctg
