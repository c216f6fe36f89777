//! Which blocks of the KV cache are free, and who has the others.
//!
//! Kwon et al. 2023 (PagedAttention), <https://arxiv.org/abs/2309.06180>.

/// Hands out blocks of `block_size` token slots.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    num_blocks: usize,
    free: Vec<u32>,
}

impl BlockManager {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self { block_size, num_blocks, free: (0..num_blocks as u32).rev().collect() }
    }

    /// Token slots per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Blocks that nobody has.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `tokens` tokens take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Blocks for `tokens` tokens, or `None` if so many are not free.
    pub fn allocate(&mut self, tokens: usize) -> Option<BlockTable> {
        let count = self.blocks_for(tokens);
        let rest = self.free.len().checked_sub(count)?;
        Some(BlockTable { blocks: self.free.split_off(rest), block_size: self.block_size })
    }

    /// Takes blocks back.
    pub fn free(&mut self, table: BlockTable) {
        self.free.extend(table.blocks);
        debug_assert!(self.free.len() <= self.num_blocks, "a block was freed twice");
    }
}

/// The blocks of one sequence, in order of its positions. Not clonable: whoever has it must give it back once.
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<u32>,
    block_size: usize,
}

impl BlockTable {
    /// The blocks.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Cache slot of a position.
    pub fn slot(&self, position: usize) -> i32 {
        (self.blocks[position / self.block_size] as usize * self.block_size + position % self.block_size) as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn tables_never_share_blocks_and_all_come_back() {
        let mut manager = BlockManager::new(10, 4);
        let (a, b) = (manager.allocate(13).unwrap(), manager.allocate(24).unwrap());
        let distinct: BTreeSet<u32> = a.blocks().iter().chain(b.blocks()).copied().collect();
        assert_eq!((distinct.len(), manager.num_free()), (10, 0));
        assert!(manager.allocate(1).is_none());
        manager.free(a);
        assert_eq!(manager.num_free(), 4);
        manager.free(b);
        assert_eq!(manager.num_free(), 10);
    }

    #[test]
    fn slots_follow_positions_across_blocks() {
        let mut manager = BlockManager::new(3, 4);
        let table = manager.allocate(9).unwrap();
        let slots: BTreeSet<i32> = (0..9).map(|p| table.slot(p)).collect();
        assert_eq!(slots.len(), 9);
        assert_eq!(table.slot(5), table.blocks()[1] as i32 * 4 + 1);
    }
}
