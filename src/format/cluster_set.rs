//! A set of host clusters: one bit for each cluster of a file.

use std::ops::Range;

use super::HostCluster;

/// See the module's text. The system provides the memory only as bits are set, so
/// a file that claims to be huge costs no more than its BAT has entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSet {
    words: Vec<u64>,
    len: u64,
}

const BITS: u64 = u64::BITS as u64;

impl ClusterSet {
    /// None of the first `len` clusters of a file; at most 2^32.
    pub fn new(len: u64) -> Self {
        Self {
            // All zero: asked for as such, and not written to.
            words: vec![0; len.div_ceil(BITS) as usize],
            len,
        }
    }

    /// The file has become longer, if this is more than [`Self::len`].
    pub fn lengthen(&mut self, len: u64) {
        if len > self.len {
            self.words.resize(len.div_ceil(BITS) as usize, 0);
            self.len = len;
        }
    }

    /// How many clusters can be in it.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether no cluster can be in it.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the cluster is in it.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let (word, bit) = place(cluster);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Puts a cluster into the set; false if it was there, or cannot be.
    pub fn insert(&mut self, cluster: HostCluster) -> bool {
        let (word, bit) = place(cluster);
        match self.words.get_mut(word) {
            Some(word) if u64::from(cluster.0) < self.len && *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    /// One after the last cluster in it; cluster 0 if there is none.
    pub fn end(&self) -> HostCluster {
        let last = self.words.iter().rposition(|word| *word != 0);
        let end = last.map(|at| (at as u64 + 1) * BITS - u64::from(self.words[at].leading_zeros()));
        HostCluster(end.unwrap_or(0) as u32)
    }

    /// The clusters from `from` on that are not in it, in runs. Takes time for each
    /// run and for every 64 clusters.
    pub fn gaps(&self, from: HostCluster) -> impl Iterator<Item = Range<HostCluster>> {
        let mut at = u64::from(from.0);
        std::iter::from_fn(move || {
            let start = self.find(at, false);
            at = self.find(start, true);
            (start < at).then_some(HostCluster(start as u32)..HostCluster(at as u32))
        })
    }

    /// The first cluster from `from` on that is in the set, or is not; the end of
    /// the file if there is none.
    fn find(&self, from: u64, is_in: bool) -> u64 {
        let flip = if is_in { 0 } else { u64::MAX };
        let mut at = from;
        while at < self.len {
            let rest = (self.words[(at / BITS) as usize] ^ flip) >> (at % BITS);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(self.len);
            }
            at = (at / BITS + 1) * BITS;
        }
        self.len
    }
}

fn place(cluster: HostCluster) -> (usize, u64) {
    let cluster = u64::from(cluster.0);
    ((cluster / BITS) as usize, 1 << (cluster % BITS))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gaps(set: &ClusterSet, from: u32) -> Vec<(u32, u32)> {
        let gaps = set.gaps(HostCluster(from));
        gaps.map(|gap| (gap.start.0, gap.end.0)).collect()
    }

    #[test]
    fn gaps_lie_between_what_is_in_it() {
        let mut set = ClusterSet::new(200);
        assert_eq!(gaps(&set, 3), [(3, 200)]);
        assert_eq!(gaps(&set, 200), []);
        assert_eq!(set.end(), HostCluster(0));
        for cluster in [3, 4, 63, 64, 127, 128, 199] {
            assert!(set.insert(HostCluster(cluster)));
            assert!(!set.insert(HostCluster(cluster)));
        }
        assert!(!set.insert(HostCluster(200)) && !set.contains(HostCluster(200)));
        assert_eq!(gaps(&set, 4), [(5, 63), (65, 127), (129, 199)]);
        assert_eq!(set.end(), HostCluster(200));
    }

    #[test]
    fn more_can_be_in_it_when_the_file_is_longer() {
        let mut set = ClusterSet::new(62);
        set.insert(HostCluster(61));
        set.lengthen(66);
        set.lengthen(3);
        assert!(set.insert(HostCluster(65)) && !set.insert(HostCluster(66)));
        assert_eq!(gaps(&set, 60), [(60, 61), (62, 65)]);
    }

    #[test]
    fn the_largest_file_is_looked_through_in_no_time() {
        let len = u32::MAX;
        let mut set = ClusterSet::new(u64::from(len));
        set.insert(HostCluster(5));
        set.insert(HostCluster(len - 2));
        assert_eq!(gaps(&set, 0), [(0, 5), (6, len - 2), (len - 1, len)]);
    }

    proptest! {
        #[test]
        fn it_is_what_a_list_is(
            len in 1..400_u32,
            clusters in prop::collection::btree_set(0..400_u32, 0..60),
            from in 0..400_u32,
        ) {
            let mut set = ClusterSet::new(u64::from(len));
            for cluster in &clusters {
                prop_assert_eq!(set.insert(HostCluster(*cluster)), *cluster < len);
            }
            let outside: Vec<u32> = set.gaps(HostCluster(from)).flat_map(|gap| gap.start.0..gap.end.0).collect();
            let expected: Vec<u32> = (from..len).filter(|at| !clusters.contains(at)).collect();
            prop_assert_eq!(outside, expected);
            let last = clusters.iter().copied().filter(|at| *at < len).max();
            prop_assert_eq!(set.end().0, last.map_or(0, |last| last + 1));
        }
    }
}
