//! Blocks of the KV cache: who holds them, and which of them hold a prefix that another sequence can use.
//!
//! Kwon et al. 2023 (PagedAttention), <https://arxiv.org/abs/2309.06180>. A full block is known by a hash over everything that
//! determines its keys and values: the blocks before it, its token ids, and the images that stand in it. Blocks that nobody
//! holds keep their content until they are needed; the least recently used one goes first.

use std::collections::{BTreeMap, HashMap};

/// Identifies the content of a full block and of all blocks before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// What precedes the first block: model, and whatever separates callers that must not share (a tenant's salt).
    pub fn root(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("idefics-serve kv cache root v1");
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The block behind this one with these tokens. `images` are the image rows in it: place in the block, key of the image,
    /// row of the image.
    pub fn then(&self, token_ids: &[u32], images: impl Iterator<Item = (usize, [u8; 32], usize)>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("idefics-serve kv cache block v1");
        hasher.update(&self.0).update(&(token_ids.len() as u64).to_le_bytes());
        for id in token_ids {
            hasher.update(&id.to_le_bytes());
        }
        for (place, key, row) in images {
            hasher.update(&(place as u64).to_le_bytes()).update(&key).update(&(row as u64).to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: u32,
    hash: Option<BlockHash>,
    /// When it was last given back; its place among the free ones.
    freed_at: u64,
}

/// Hands out blocks of `block_size` token slots and shares full ones.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    blocks: Vec<Block>,
    /// Blocks that nobody holds, least recently used first.
    free: BTreeMap<u64, u32>,
    /// Where a prefix lies; held or free.
    by_hash: HashMap<BlockHash, u32>,
    clock: u64,
}

impl BlockManager {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        let mut blocks = vec![Block::default(); num_blocks];
        let free = (0..num_blocks as u64).map(|i| (i, i as u32)).collect();
        blocks.iter_mut().enumerate().for_each(|(i, block)| block.freed_at = i as u64);
        Self { block_size, blocks, free, by_hash: HashMap::new(), clock: num_blocks as u64 }
    }

    /// Token slots per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `tokens` tokens take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// How many blocks of `hashes`, from the first on, are in the cache, and how many of these nobody holds.
    pub fn lookup(&self, hashes: &[BlockHash]) -> (usize, usize) {
        let found = hashes.iter().map_while(|hash| self.by_hash.get(hash));
        found.fold((0, 0), |(all, free), block| (all + 1, free + usize::from(self.blocks[*block as usize].holders == 0)))
    }

    /// Adds the cached blocks of `hashes`, from the first on, to a sequence's table; returns how many.
    pub fn share(&mut self, hashes: &[BlockHash], table: &mut BlockTable) -> usize {
        let mut shared = 0;
        for hash in hashes {
            let Some(&block) = self.by_hash.get(hash) else { break };
            let state = &mut self.blocks[block as usize];
            if state.holders == 0 {
                self.free.remove(&state.freed_at);
            }
            state.holders += 1;
            table.blocks.push(block);
            shared += 1;
        }
        shared
    }

    /// Extends a table to `tokens` tokens; changes nothing and says no if so many blocks are not free.
    #[must_use]
    pub fn extend(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = self.blocks_for(tokens).saturating_sub(table.blocks.len());
        if missing > self.free.len() {
            return false;
        }
        for _ in 0..missing {
            let Some((_, block)) = self.free.pop_first() else { return false };
            let state = &mut self.blocks[block as usize];
            state.holders = 1;
            // Its old content is about to be overwritten.
            if let Some(hash) = state.hash.take()
                && self.by_hash.get(&hash) == Some(&block)
            {
                self.by_hash.remove(&hash);
            }
            table.blocks.push(block);
        }
        true
    }

    /// Makes a full block of a table known under its hash. If another block has that content already, that one stays known.
    pub fn publish(&mut self, table: &BlockTable, index: usize, hash: BlockHash) {
        let block = table.blocks[index];
        if self.by_hash.contains_key(&hash) || self.blocks[block as usize].hash.is_some() {
            return;
        }
        self.by_hash.insert(hash, block);
        self.blocks[block as usize].hash = Some(hash);
    }

    /// Makes the blocks of a table unknown to others; who holds them keeps them.
    pub fn withdraw(&mut self, table: &BlockTable) {
        for block in &table.blocks {
            if let Some(hash) = self.blocks[*block as usize].hash.take()
                && self.by_hash.get(&hash) == Some(block)
            {
                self.by_hash.remove(&hash);
            }
        }
    }

    /// Takes a table back. The last blocks of a sequence become free before the first, so that prefixes live longest.
    pub fn release(&mut self, table: BlockTable) {
        for block in table.blocks.into_iter().rev() {
            let state = &mut self.blocks[block as usize];
            debug_assert!(state.holders > 0, "block {block} was given back twice");
            state.holders -= 1;
            if state.holders == 0 {
                state.freed_at = self.clock;
                self.free.insert(self.clock, block);
                self.clock += 1;
            }
        }
    }
}

/// The blocks of one sequence, in order of its positions. Not clonable: whoever has it must give it back once.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// The blocks.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Cache slot of a position.
    pub fn slot(&self, position: usize, block_size: usize) -> i32 {
        (self.blocks[position / block_size] as usize * block_size + position % block_size) as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn hashes(ids: &[u32], block_size: usize) -> Vec<BlockHash> {
        let mut hash = BlockHash::root(&[b"model"]);
        let blocks = ids.chunks_exact(block_size).map(|block| {
            hash = hash.then(block, std::iter::empty());
            hash
        });
        blocks.collect()
    }

    fn table(manager: &mut BlockManager, tokens: usize) -> Option<BlockTable> {
        let mut table = BlockTable::default();
        manager.extend(&mut table, tokens).then_some(table)
    }

    #[test]
    fn tables_never_share_unpublished_blocks_and_all_come_back() {
        let mut manager = BlockManager::new(10, 4);
        let (a, b) = (table(&mut manager, 13).unwrap(), table(&mut manager, 24).unwrap());
        let distinct: BTreeSet<u32> = a.blocks().iter().chain(b.blocks()).copied().collect();
        assert_eq!((distinct.len(), manager.num_free()), (10, 0));
        assert!(table(&mut manager, 1).is_none());
        manager.release(a);
        assert_eq!(manager.num_free(), 4);
        manager.release(b);
        assert_eq!(manager.num_free(), 10);
    }

    #[test]
    fn slots_follow_positions_across_blocks() {
        let mut manager = BlockManager::new(3, 4);
        let table = table(&mut manager, 9).unwrap();
        let slots: BTreeSet<i32> = (0..9).map(|p| table.slot(p, 4)).collect();
        assert_eq!(slots.len(), 9);
        assert_eq!(table.slot(5, 4), table.blocks()[1] as i32 * 4 + 1);
    }

    #[test]
    fn published_prefixes_are_shared_while_held_and_after() {
        let mut manager = BlockManager::new(4, 4);
        let hashes = hashes(&[1, 2, 3, 4, 5, 6, 7, 8], 4);
        let first = table(&mut manager, 8).unwrap();
        (0..2).for_each(|i| manager.publish(&first, i, hashes[i]));
        let mut second = BlockTable::default();
        assert_eq!((manager.lookup(&hashes), manager.share(&hashes, &mut second)), ((2, 0), 2));
        assert_eq!((second.blocks(), manager.num_free()), (first.blocks(), 2));
        manager.release(first);
        assert_eq!(manager.num_free(), 2, "the second still holds them");
        manager.release(second);
        assert_eq!((manager.num_free(), manager.lookup(&hashes)), (4, (2, 2)));
    }

    #[test]
    fn ends_of_old_sequences_are_overwritten_first() {
        let mut manager = BlockManager::new(3, 4);
        let hashes = hashes(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 4);
        let old = table(&mut manager, 12).unwrap();
        (0..3).for_each(|i| manager.publish(&old, i, hashes[i]));
        manager.release(old);
        let new = table(&mut manager, 4).unwrap();
        assert_eq!(manager.lookup(&hashes), (2, 2));
        manager.release(new);
    }

    #[test]
    fn hashes_tell_everything_apart_that_changes_the_content() {
        let root = BlockHash::root(&[b"model", b""]);
        let image = |place, key, row| vec![(place, [key; 32], row)].into_iter();
        let all = [
            root,
            BlockHash::root(&[b"model", b"tenant"]),
            BlockHash::root(&[b"modelt", b"enant"]),
            root.then(&[1, 2], std::iter::empty()),
            root.then(&[2, 1], std::iter::empty()),
            root.then(&[1], std::iter::empty()).then(&[2], std::iter::empty()),
            root.then(&[1, 2], image(0, 1, 0)),
            root.then(&[1, 2], image(1, 1, 0)),
            root.then(&[1, 2], image(0, 2, 0)),
            root.then(&[1, 2], image(0, 1, 1)),
        ];
        let distinct: std::collections::HashSet<&BlockHash> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
