//! Several choices for one prompt: its blocks are held together, its place in the queue is one.

use super::*;

#[test]
fn choices_compute_the_prompt_once_and_hold_its_blocks_together() {
    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 100);
    let (s, mut events) = submit(&Request { n: 3, ..request((0..18).collect(), 5) });
    scheduler.add(s);
    assert_eq!(scheduler.len(), 3);
    let mut steps = Vec::new();
    for _ in 0..2 {
        let step = scheduler.schedule();
        steps.push(step.iter().map(|part| (part.sequence, part.num_tokens)).collect::<Vec<_>>());
        run(&mut scheduler, &step);
    }
    // Four full blocks are shared; two tokens behind them are computed by each.
    assert_eq!(steps, [vec![(0, 18)], vec![(0, 1), (1, 2), (2, 2)]]);
    let tables: Vec<Vec<u32>> = scheduler.running().iter().map(|s| s.block_table.blocks().to_vec()).collect();
    assert!(tables.iter().all(|table| table.len() == 5 && table[..4] == tables[0][..4]));
    assert_eq!(64 - scheduler.blocks().num_free(), 4 + 3);
    run_all(&mut scheduler);
    assert_eq!(ended_once(&mut events, 3).choices, [(5, FinishReason::Length); 3]);
    assert_eq!(scheduler.blocks().num_free(), 64);
}

#[test]
fn choices_keep_their_requests_place_in_the_queue() {
    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 2, 100);
    let (first, _first) = submit(&Request { n: 3, ..request((0..10).collect(), 1) });
    let (second, _second) = own(2, 3, 1);
    scheduler.add(first);
    scheduler.add(second);
    let mut order = Vec::new();
    while !scheduler.is_empty() {
        let step = scheduler.schedule();
        order.push(scheduler.running().iter().map(|s| (s.number(), s.choice)).collect::<Vec<_>>());
        run(&mut scheduler, &step);
    }
    // While the prompt is computed the second request uses the free place; from then on it would wait for the choices.
    assert_eq!(order, [vec![(0, 0), (1, 0)], vec![(0, 1), (0, 2)]]);
}

#[test]
fn first_choice_that_ends_at_its_first_token_leaves_its_prompt_to_the_others() {
    let mut scheduler = Scheduler::new(BlockManager::new(8, 4), 8, 100);
    let (s, mut events) = submit(&Request { n: 2, ..request((0..9).collect(), 1) });
    scheduler.add(s);
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    assert_eq!((scheduler.num_running(), scheduler.len()), (0, 1));
    assert_eq!(scheduler.schedule()[0].num_tokens, 1, "two blocks of four are still known");
    run(&mut scheduler, &[Scheduled { sequence: 0, num_tokens: 1, num_drafts: 0 }]);
    assert_eq!(ended_once(&mut events, 2).choices, [(1, FinishReason::Length); 2]);
    assert_eq!(scheduler.blocks().num_free(), 8);
}

#[test]
fn cancelling_a_choice_leaves_the_others_alone() {
    // With 5 tokens a step, the prompt takes two steps: choices are cancelled before it is computed, and behind it.
    for steps in 0..4 {
        for choice in 0..3 {
            let mut scheduler = Scheduler::new(BlockManager::new(16, 4), 8, 5);
            let (s, mut events) = submit(&Request { n: 3, ..request((0..9).collect(), 4) });
            scheduler.add(s);
            for _ in 0..steps {
                let step = scheduler.schedule();
                run(&mut scheduler, &step);
            }
            scheduler.cancel("another", choice);
            scheduler.cancel("r", 3);
            assert_eq!(scheduler.len(), 3);
            scheduler.cancel("r", choice);
            scheduler.cancel("r", choice);
            assert_eq!(scheduler.len(), 2);
            run_all(&mut scheduler);
            let ends = ended_once(&mut events, 3).choices;
            for (i, (tokens, reason)) in ends.iter().enumerate() {
                let expected = if i == choice { FinishReason::Cancelled } else { FinishReason::Length };
                assert_eq!(*reason, expected, "choice {i} after {steps} steps");
                assert!(i == choice || *tokens == 4);
            }
            assert_eq!(scheduler.blocks().num_free(), 16);
        }
    }
}

#[test]
fn abandoned_choices_are_dropped_together() {
    for steps in 0..4 {
        let mut scheduler = Scheduler::new(BlockManager::new(16, 4), 2, 5);
        let (s, events) = submit(&Request { n: 3, ..request((0..9).collect(), 9) });
        scheduler.add(s);
        for _ in 0..steps {
            let step = scheduler.schedule();
            run(&mut scheduler, &step);
        }
        drop(events);
        assert!(scheduler.schedule().is_empty());
        assert_eq!((scheduler.len(), scheduler.blocks().num_free()), (0, 16));
    }
}
