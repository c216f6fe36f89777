//! The answers are those of `transformers`, set up as `golden/reference.py` does: prompt ids, image tokens, greedy tokens and
//! log-probabilities, on the demo checkpoint and on a random one of other sizes. `cargo test -p idefics-tests --test parity --
//! --nocapture` prints the differences.

use idefics_tests::{
    checkpoint,
    golden::{self, IMAGE_TOKENS_TOLERANCE, LOGPROB_TOLERANCE, LOGPROBS, Pictures, RandomCase},
    process::{Answer, Idefics, Server},
};
use std::ffi::OsString;

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

fn args(parts: &[&str]) -> Vec<OsString> {
    parts.iter().map(OsString::from).collect()
}

#[test]
fn demo_answers_equal_the_reference() {
    let server = IDEFICS.serve(None);
    let folder = tempfile::tempdir().unwrap();
    for (index, case) in golden::demo_cases().iter().enumerate() {
        let messages = folder.path().join(format!("{index}.json"));
        golden::write_messages(&case.messages, &messages, golden::demo_picture);
        let mut args = args(&["--endpoint", &server.endpoint(), "--no-split", "--messages"]);
        args.push(messages.into());
        args.extend(LOGPROBS.map(Into::into));
        let answer = IDEFICS.ask(args);
        assert_eq!(answer.prompt_token_ids, case.prompt_token_ids, "prompt of case {index}");
        assert_eq!(answer.token_ids, case.token_ids, "answer of case {index}: {:?} for {:?}", answer.text, case.text);
        assert_eq!(answer.text.trim(), case.text, "text of case {index}");
        assert_eq!(answer.finish_reason, "stop", "case {index}");
        let difference = golden::logprob_difference(&answer, std::slice::from_ref(&case.first_top5));
        println!("demo case {index:2}: tokens identical, log-probabilities within {difference:.1e}");
        assert!(difference <= LOGPROB_TOLERANCE, "case {index}: log-probabilities differ by {difference:.1e}");
    }
}

#[test]
fn penalised_demo_answers_equal_the_reference() {
    let server = IDEFICS.serve(None);
    let folder = tempfile::tempdir().unwrap();
    let sources = golden::demo_cases();
    for (index, case) in golden::sampling_cases().iter().enumerate() {
        let messages = folder.path().join(format!("{index}.json"));
        golden::write_messages(&sources[case.case].messages, &messages, golden::demo_picture);
        let mut args = args(&["--endpoint", &server.endpoint(), "--no-split", "--messages"]);
        args.push(messages.into());
        args.extend(case.flags.iter().map(Into::into));
        let answer = IDEFICS.ask(args);
        assert_eq!(answer.token_ids, case.token_ids, "{:?}: {:?}", case.flags, answer.text);
        assert_eq!(answer.finish_reason, case.finish_reason, "{:?}", case.flags);
    }
}

#[test]
fn demo_prompts_have_the_log_probabilities_of_the_reference() {
    let server = IDEFICS.serve(None);
    let folder = tempfile::tempdir().unwrap();
    let sources = golden::demo_cases();
    for case in &golden::prompt_logprobs_cases() {
        let messages = folder.path().join(format!("{}.json", case.case));
        golden::write_messages(&sources[case.case].messages, &messages, golden::demo_picture);
        // The first request leaves its prompt in the cache, and the second must not take it from there.
        for _ in 0..2 {
            let mut args = args(&["--endpoint", &server.endpoint(), "--no-split", "--max-new-tokens", "1", "--prompt-logprobs", "5"]);
            args.extend(["--messages".into(), messages.clone().into()]);
            let difference = golden::prompt_logprob_difference(&IDEFICS.ask(args), case);
            println!("demo case {:2}: prompt's log-probabilities within {difference:.1e}", case.case);
            assert!(difference <= LOGPROB_TOLERANCE, "case {}: log-probabilities differ by {difference:.1e}", case.case);
        }
    }
}

#[test]
fn demo_image_tokens_equal_the_reference() {
    let server = IDEFICS.serve(None);
    check_encodes(&server, "demo", 16, |name| golden::demo_picture(name).into());
}

#[test]
fn random_image_tokens_equal_the_reference() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    let server = IDEFICS.serve(Some(model.path()));
    check_encodes(&server, "random", 64, |name| pictures.path(name).into());
}

fn check_encodes(server: &Server, of: &str, tokens_per_image: usize, locate: impl Fn(&str) -> OsString) {
    for case in golden::encodes(of) {
        let mut args = args(&["--endpoint", &server.endpoint()]);
        args.extend(case.images.iter().flat_map(|name| ["--image".into(), locate(name)]));
        args.extend(case.options.flags().into_iter().map(Into::into));
        let difference = IDEFICS.encode(args).distance(&case.image_tokens, tokens_per_image);
        println!("{of} {:12}: image tokens within {difference:.1e}", case.name);
        // Not `>`, which a NaN would pass.
        assert!(difference <= IMAGE_TOKENS_TOLERANCE, "{of} {}: image tokens are {difference:.1e} away", case.name);
    }
}

#[test]
fn random_answers_equal_the_reference() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    let server = IDEFICS.serve(Some(model.path()));
    for case in golden::random_cases() {
        let mut flags = args(&["--endpoint", &server.endpoint()]);
        flags.extend(case.arguments(&pictures));
        check_random(&case, &IDEFICS.ask(flags));
    }
}

#[test]
fn one_command_answers_as_the_server_does() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    for name in ["image_first", "raw_adjacent_split"] {
        let case = golden::random_case(name);
        let mut flags = args(&["--model"]);
        flags.push(model.path().into());
        flags.extend(case.arguments(&pictures));
        check_random(&case, &IDEFICS.ask(flags));
    }
    let case = golden::encodes("random").into_iter().find(|case| case.name == "tall").unwrap();
    let flags = [OsString::from("--no-split"), "--model".into(), model.path().into(), "--image".into(), pictures.path("tall").into()];
    let difference = IDEFICS.encode(flags).distance(&case.image_tokens, 64);
    assert!(difference <= IMAGE_TOKENS_TOLERANCE, "image tokens are {difference:.1e} away");
}

#[test]
fn one_command_without_a_model_answers_with_the_demo() {
    let case = golden::demo_cases().into_iter().find(|case| case.text.starts_with("A blue star")).unwrap();
    let picture = golden::demo_picture("pictures/01.png");
    let answer = IDEFICS.ask([OsString::from("--image"), picture.into(), "What is in this image?".into()]);
    assert_eq!(answer.prompt_token_ids, case.prompt_token_ids);
    assert_eq!(answer.token_ids, case.token_ids);
    assert_eq!(answer.text.trim(), case.text);
    assert!(answer.logprobs.is_empty(), "log-probabilities come only when asked for");
}

/// The rows of the output matrix for the two tokens that must not appear are made so large that they would always win.
#[test]
fn image_marks_are_never_generated() {
    let case = golden::random_case("text");
    let model = checkpoint::write(&checkpoint::Form::default(), |tensors| {
        let hidden = 128;
        let head = &mut tensors.get_mut("lm_head.weight").unwrap().values;
        for (mark, copied) in [(600, 0), (601, 1)] {
            let row = case.token_ids[copied] as usize * hidden;
            let louder: Vec<f32> = head[row..row + hidden].iter().map(|v| v * 8.0).collect();
            head[mark * hidden..(mark + 1) * hidden].copy_from_slice(&louder);
        }
    });
    let folder = Pictures::write();
    let mut flags = args(&["--model"]);
    flags.push(model.path().into());
    flags.extend(case.arguments(&folder));
    assert_eq!(IDEFICS.ask(flags).token_ids, case.token_ids, "the best of the other tokens is taken");
}

fn check_random(case: &RandomCase, answer: &Answer) {
    let name = &case.name;
    assert_eq!(answer.prompt_token_ids, case.prompt_token_ids, "prompt of {name}");
    assert_eq!(answer.token_ids, case.token_ids, "answer of {name}");
    assert_eq!(answer.finish_reason, case.finish_reason, "{name}");
    // A leading space belongs to the first token; whether it is shown is the server's choice.
    assert_eq!(answer.text.trim_start(), case.text.trim_start(), "text of {name}");
    assert_eq!(answer.usage.prompt_tokens as usize, case.prompt_token_ids.len(), "{name}");
    assert_eq!(answer.usage.image_tokens, case.image_tokens, "{name}");
    assert_eq!(answer.usage.completion_tokens as usize, case.token_ids.len(), "{name}");
    let difference = golden::logprob_difference(answer, &case.top5);
    println!("random {name:18}: tokens identical, log-probabilities within {difference:.1e}");
    assert!(difference <= LOGPROB_TOLERANCE, "{name}: log-probabilities differ by {difference:.1e}");
}
