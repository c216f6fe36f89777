//! Steps that are decided before the tokens of the step before are seen.

use super::*;

/// A scheduler whose sequences have had their first step.
fn decoding(num_blocks: usize, max_seqs: usize, lengths: &[(usize, usize)]) -> (Scheduler, Vec<UnboundedReceiver<Event>>) {
    let mut scheduler = Scheduler::new(BlockManager::new(num_blocks, 4), max_seqs, 100);
    let mut receivers = Vec::new();
    for (i, (prompt, max_new_tokens)) in lengths.iter().enumerate() {
        let (s, receiver) = own(i as u32 + 1, *prompt, *max_new_tokens);
        scheduler.add(s);
        receivers.push(receiver);
    }
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    (scheduler, receivers)
}

fn ranks(scheduler: &mut Scheduler) -> Vec<Rank> {
    scheduler.running().iter().map(Sequence::rank).collect()
}

/// The sequences of a step ahead and where their tokens come from.
fn parts(ahead: Option<Ahead>) -> Option<Vec<(usize, usize)>> {
    ahead.map(|Ahead { step, sources }| step.iter().map(|part| part.sequence).zip(sources).collect())
}

#[test]
fn who_gets_the_last_token_has_no_part_in_the_step_behind() {
    let (mut scheduler, _receivers) = decoding(64, 8, &[(4, 9), (4, 2), (4, 9)]);
    let step = scheduler.schedule();
    let in_flight = ranks(&mut scheduler);
    assert_eq!(parts(scheduler.schedule_ahead(&in_flight)), Some(vec![(0, 0), (2, 2)]));
    assert_eq!(run(&mut scheduler, &step), 1);
    // Behind that one only its own sequences are in flight, at other places.
    let in_flight = ranks(&mut scheduler);
    assert_eq!(parts(scheduler.schedule_ahead(&in_flight)), Some(vec![(0, 0), (1, 1)]));
}

#[test]
fn cancelled_and_abandoned_sequences_have_no_part_either() {
    let (mut scheduler, mut receivers) = decoding(64, 8, &[(4, 9), (4, 9), (4, 9)]);
    scheduler.schedule();
    let in_flight = ranks(&mut scheduler);
    receivers.remove(1);
    assert_eq!(parts(scheduler.schedule_ahead(&in_flight)), Some(vec![(0, 0), (1, 2)]));
    assert_eq!((scheduler.position(in_flight[1]), scheduler.position(in_flight[2])), (None, Some(1)));
}

#[test]
fn newcomer_waits_for_the_step_that_is_queued_and_no_other() {
    let (mut scheduler, _receivers) = decoding(64, 8, &[(4, 9)]);
    let step = scheduler.schedule();
    let in_flight = ranks(&mut scheduler);
    let ahead = scheduler.schedule_ahead(&in_flight).unwrap();
    let (late, _late) = own(7, 4, 9);
    scheduler.add(late);
    run(&mut scheduler, &step);
    assert_eq!(scheduler.schedule_ahead(&in_flight), None);
    run(&mut scheduler, &ahead.step);
    assert_eq!(scheduler.schedule().len(), 2);
}

#[test]
fn who_cannot_run_does_not_hold_others_up_until_a_place_is_about_to_be_free() {
    let (mut scheduler, _receivers) = decoding(64, 2, &[(4, 9), (4, 3), (4, 9)]);
    let mut decided = Vec::new();
    for _ in 0..3 {
        let step = scheduler.schedule();
        let in_flight = ranks(&mut scheduler);
        decided.push(scheduler.schedule_ahead(&in_flight).is_some());
        run(&mut scheduler, &step);
    }
    // Then the second gets its third token, and the third its prompt.
    assert_eq!(decided, [true, false, true]);
    assert_eq!(scheduler.num_running(), 2);
}

#[test]
fn nobody_gives_way_to_a_step_ahead_and_nothing_is_taken_for_it_in_vain() {
    // Three blocks each, and a fourth for one of the two.
    let (mut scheduler, _receivers) = decoding(7, 8, &[(11, 9), (11, 9)]);
    scheduler.schedule();
    let in_flight = ranks(&mut scheduler);
    assert_eq!(scheduler.schedule_ahead(&in_flight), None);
    assert_eq!((scheduler.blocks().num_free(), scheduler.num_preemptions()), (1, 0));
}

#[test]
fn guesses_prompts_and_choices_that_wait_for_them_are_not_decided_ahead() {
    let (scheduler, _receivers) = decoding(64, 8, &[(4, 9)]);
    let mut scheduler = scheduler.with_prompt_lookup(2);
    let in_flight = ranks(&mut scheduler);
    assert_eq!(scheduler.schedule_ahead(&in_flight), None, "guesses");

    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 6);
    let (first, _first) = own(1, 4, 9);
    let (second, _second) = own(2, 9, 9);
    scheduler.add(first);
    scheduler.add(second);
    let step = scheduler.schedule();
    // The second has the rest of the budget, which is not all of its prompt; who gets no token now is not in flight.
    let in_flight: Vec<Rank> = ranks(&mut scheduler)[..1].to_vec();
    assert_eq!((step.len(), scheduler.schedule_ahead(&in_flight)), (2, None), "a prompt");

    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 100);
    let (several, _several) = submit(&Request { n: 2, ..request((0..9).collect(), 9) });
    scheduler.add(several);
    scheduler.schedule();
    let in_flight = ranks(&mut scheduler);
    assert_eq!(scheduler.schedule_ahead(&in_flight), None, "choices");
}
