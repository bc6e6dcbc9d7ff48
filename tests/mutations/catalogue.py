"""Defects as they could be written, each with the tests that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

FOLD = "tests/core/test_fold.py"
PLANNER = "tests/core/test_planner.py"
VARIANTS = "tests/core/test_variants.py"
FAIRNESS = "tests/core/test_fairness.py"
LOOP = "tests/control/test_loop.py"
PREVIEW = "tests/control/test_preview.py"
LATE_ENGINE = "tests/control/test_late_engine.py"
SCENARIOS = "tests/control/test_scenarios.py"
FOREIGN = "tests/core/test_foreign.py"
CONTAINER_NAMES = "tests/control/test_container_names.py"
RECOVERY = "tests/control/test_recovery.py"
LEARNING = "tests/control/test_learning.py"
KEYRING = "tests/control/test_keyring.py"
STATEFUL = "tests/control/test_stateful.py::test_every_promise_holds_whatever_happens"


@dataclass(frozen=True)
class Edit:
    """In a module of the package: `old` must be there exactly once, and becomes `new`."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    name: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]


def mutation(name: str, *edits: tuple[str, str, str], caught_by: tuple[str, ...]) -> Mutation:
    return Mutation(name, tuple(Edit(*edit) for edit in edits), caught_by)


MUTATIONS = (
    mutation(
        "memory is counted as free at the exit",
        (
            "core/ledger.py",
            "    if not instance.holds_reservation:\n        return 0\n    return max(0, instance",
            "    if instance.state is State.RECLAIMING:\n        return -instance.held_bytes.get(device, 0)\n"
            "    if not instance.holds_reservation:\n        return 0\n    return max(0, instance",
        ),
        caught_by=(f"{LOOP}::test_an_idle_model_makes_room_and_its_memory_is_waited_for",),
    ),
    mutation(
        "memory that is still in use is not waited for",
        ("core/fold.py", "if missing and waited_s < RECLAIM_LIMIT_S:", "if missing and waited_s < 0.0:"),
        caught_by=(f"{FOLD}::test_memory_is_held_until_it_is_seen_free",),
    ),
    mutation(
        "a start is decided on a sample older than the last release",
        (
            "core/claims.py",
            "return draft.snapshot.sample.taken_at_s >= draft.snapshot.released_at_s.get(device, 0.0)",
            "return True",
        ),
        caught_by=(f"{PLANNER}::test_a_start_waits_for_a_sample_newer_than_the_last_release",),
    ),
    mutation(
        "what was promised and not taken yet is not kept back",
        (
            "core/ledger.py",
            "promised = sum(kept_back(holder, device.id, reading) for holder in holders)",
            "promised = 0 * len(list(holders))",
        ),
        caught_by=(f"{PLANNER}::test_what_a_starting_model_has_not_taken_yet_is_kept_back", STATEFUL),
    ),
    mutation(
        "a claim does not count as held",
        (
            "core/lifecycle.py",
            "    {State.CLAIMED, State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK}\n",
            "    {State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK}\n",
        ),
        caught_by=(f"{PLANNER}::test_nobody_passes_a_claim",),
    ),
    mutation(
        "what is stuck gives up its reservation",
        (
            "core/lifecycle.py",
            "    {State.CLAIMED, State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK}\n",
            "    {State.CLAIMED, State.STARTING, State.READY, State.DRAINING, State.STOPPING}\n",
        ),
        caught_by=(f"{SCENARIOS}::test_what_is_stuck_half_loaded_keeps_all_it_was_promised",),
    ),
    mutation(
        "a device that cannot be measured counts as empty",
        (
            "core/snapshot.py",
            "return self.sample.readings.get(device)",
            "return self.sample.readings.get(device) or Reading(self.devices[device].capacity_bytes, 0)",
        ),
        caught_by=(f"{PLANNER}::test_the_other_gpu_still_serves", STATEFUL),
    ),
    mutation(
        "a sample is believed however old it is",
        ("core/snapshot.py", "SAMPLE_LIMIT_S = 3.0", "SAMPLE_LIMIT_S = 3e9"),
        caught_by=(f"{SCENARIOS}::test_nothing_starts_on_a_sample_that_is_too_old",),
    ),
    mutation(
        "the gate of a victim is not closed",
        ("control/loop.py", "        self._gates.close(plan.closing)", "        # self._gates.close(...)"),
        caught_by=(STATEFUL,),
    ),
    mutation(
        "a pinned model is evicted",
        ("core/victims.py", " or draft.snapshot.is_pinned(instance.model)):", "):"),
        caught_by=(STATEFUL,),
    ),
    mutation(
        "a busy model is asked to leave at once",
        ("core/victims.py", "    is_busy = not draft.is_idle(instance)\n", "    is_busy = False\n"),
        caught_by=(f"{PLANNER}::test_a_busy_one_is_drained_once_it_has_stayed",),
    ),
    mutation(
        "a busy model is cut instead of drained",
        ("core/endings.py", "    if draft.in_flight(instance) and not instance.force:\n", "    if False:\n"),
        caught_by=(f"{LOOP}::test_a_busy_model_is_drained_not_cut", STATEFUL),
    ),
    mutation(
        "a drain does not relent when its claim is gone",
        (
            "core/endings.py",
            "if claim is not None and not is_claimed(draft, claim):",
            "if claim is not None and claim == instance.attempt:",
        ),
        caught_by=(f"{SCENARIOS}::test_a_busy_one_whose_room_is_no_longer_wanted_serves_on",),
    ),
    mutation(
        "effects come before intents",
        (
            "control/loop.py",
            "        try:\n            await self._save(decided)\n",
            "        for action in plan.actions:\n            self.effects.perform(action)\n"
            "        try:\n            await self._save(decided)\n",
        ),
        (
            "control/loop.py",
            "        for action in plan.actions:\n            self.effects.perform(action)\n"
            "        self._settle_forgetting",
            "        self._settle_forgetting",
        ),
        caught_by=(f"{LOOP}::test_nothing_starts_before_it_is_remembered", STATEFUL),
    ),
    mutation(
        "an engine that did not answer is taken to have started nothing, and the model starts twice",
        (
            "control/effects.py",
            '                report(Progress("waiting for the engine", detail=error.message))\n',
            "                raise\n",
        ),
        caught_by=(
            f"{LATE_ENGINE}::test_a_start_waits_for_an_engine_that_is_away",
            f"{SCENARIOS}::test_an_engine_that_starts_it_and_does_not_say_so_has_started_it_once",
        ),
    ),
    mutation(
        "what was starting when the server died is started again beside it",
        (
            "control/recovery.py",
            "case State.CLAIMED | State.STARTING | State.READY if is_running and place is not None:",
            "case State.CLAIMED | State.READY if is_running and place is not None:",
        ),
        caught_by=(f"{RECOVERY}::test_what_was_starting_goes_on_with_the_time_that_is_left",),
    ),
    mutation(
        "an orphan is not stopped on recovery",
        (
            "control/recovery.py",
            "    for item in (item for item in unknown if not item.is_lent):\n",
            "    for item in ():\n",
        ),
        caught_by=(f"{RECOVERY}::test_what_nobody_knows_is_stopped_and_said_so",),
    ),
    mutation(
        "news of an older attempt counts",
        ("core/fold.py", "    if instance.attempt != event.attempt:\n", "    if instance.attempt is None:\n"),
        caught_by=(f"{FOLD}::test_news_of_an_older_attempt_changes_nothing",),
    ),
    mutation(
        "whoever leaves at the moment of admission stays counted",
        ("control/loop.py", "            future.result().leave()\n", "            future.result()\n"),
        caught_by=(f"{LOOP}::test_cancelled_at_the_moment_of_admission",),
    ),
    mutation(
        "whoever leaves stays in the queue",
        (
            "control/loop.py",
            "            self.inbox.post(WaiterLeft(waiter.model, key))\n",
            "            pass\n",
        ),
        caught_by=(f"{SCENARIOS}::test_what_nobody_waits_for_any_more_is_not_loaded",),
    ),
    mutation(
        "age is lost with a 503",
        (
            "core/waiting.py",
            "    if age is None or now_s > age.kept_until_s:\n",
            "    if True:\n",
        ),
        caught_by=(f"{FAIRNESS}::test_age_survives_a_503_for_a_minute",),
    ),
    mutation(
        "age begins anew with each one who joins",
        (
            "core/fold.py",
            "        entry = replace(entry, waiters=(*entry.waiters, waiter), tries_now",
            "        entry = replace(entry, since_s=state.now_s, waiters=(*entry.waiters, waiter), tries_now",
        ),
        caught_by=(f"{SCENARIOS}::test_who_joins_a_wait_does_not_begin_it_anew",),
    ),
    mutation(
        "the back-off does not double",
        ("core/failures.py", "FIRST_RETRY_S * 2 ** min(failures - 1, 20)", "FIRST_RETRY_S"),
        caught_by=(f"{FOLD}::test_the_back_off_doubles_to_five_minutes",),
    ),
    mutation(
        "a key's id is enough",
        (
            "control/keyring.py",
            "if key is None or not hmac.compare_digest(key.digest, digest_of(token)):",
            "if key is None:",
        ),
        caught_by=(f"{KEYRING}::test_digests_are_compared_in_constant_time",),
    ),
    mutation(
        "revoking the last key opens a server that others can reach",
        (
            "control/keyring.py",
            "self.is_required = self._is_strict or bool(self._keys)",
            "self.is_required = bool(self._keys)",
        ),
        caught_by=(f"{KEYRING}::test_where_others_can_reach_it_a_key_is_needed_although_there_is_none",),
    ),
    mutation(
        "a shorter context than would fit is taken",
        (
            "core/placement.py",
            "free = first_choice(draft, model, variants, room, {}, is_allowed)",
            "free = first_choice(draft, model, variants[-1:], room, {}, is_allowed)",
        ),
        caught_by=(f"{VARIANTS}::test_the_largest_that_fits_starts_with_its_own_launch",),
    ),
    mutation(
        "busy models leave for a longer context",
        (
            "core/placement.py",
            "first_choice(draft, model, [least_possible(draft, model)], room, victims, is_allowed)",
            "first_choice(draft, model, variants, room, victims, is_allowed)",
        ),
        caught_by=(f"{VARIANTS}::test_the_busy_leave_for_the_least_only",),
    ),
    mutation(
        "what was chosen does not reach the engine",
        ("control/effects.py", "model.run_with(action.parameters).launch", "model.launch"),
        caught_by=(f"{PREVIEW}::test_what_was_chosen_is_what_runs_and_survives_the_server",),
    ),
    mutation(
        "a plan looks without the wish that it is asked about",
        ("core/preview.py", "plan = make_plan(asked, usage)", "plan = make_plan(snapshot, usage)"),
        caught_by=(f"{PREVIEW}::test_what_would_leave_is_what_leaves",),
    ),
    mutation(
        "one odd reading decides what a model needs",
        (
            "core/learned.py",
            "return [load for load in self.loads if self._is_near(load) or self._is_seen_again(load)]",
            "return list(self.loads)",
        ),
        caught_by=(f"{LEARNING}::test_an_odd_load_counts_for_nothing_until_it_is_seen_again",),
    ),
    mutation(
        "a start that the GPU had no room for is tried again for ever",
        (
            "core/fold.py",
            "if before.failure is None or before.failure.code != GPU_OUT_OF_MEMORY:",
            "if before.state is State.STARTING:",
        ),
        caught_by=(f"{LEARNING}::test_a_second_start_without_room_is_a_failure",),
    ),
    mutation(
        "a container that is gone is still named",
        (
            "core/fold.py",
            "return learn(with_names_shown(state), sample)",
            "return learn(state, sample)",
        ),
        caught_by=(f"{FOREIGN}::test_a_name_is_known_while_the_sample_shows_its_container",),
    ),
    mutation(
        "a name that comes too late stays for ever",
        (
            "core/foreign.py",
            "return with_names_shown(replace(state, container_names=names))",
            "return replace(state, container_names=names)",
        ),
        caught_by=(
            f"{FOREIGN}::test_a_name_that_comes_when_its_container_is_gone_is_not_kept",
            f"{CONTAINER_NAMES}::test_an_answer_that_comes_when_the_container_is_gone_is_not_kept",
        ),
    ),
    mutation(
        "each process of a container counts as a holder of its own",
        (
            "core/foreign.py",
            "groups.setdefault(process.container or process.pid, [])",
            "groups.setdefault(process.pid, [])",
        ),
        caught_by=(f"{FOREIGN}::test_the_processes_of_a_container_are_one_holder_and_the_largest_is_first",),
    ),
    mutation(
        "an engine that does not answer is asked for every container at each look",
        (
            "control/container_names.py",
            "self._retry_at_s = self._clock() + RETRY_S",
            "self._retry_at_s = 0.0",
        ),
        caught_by=(f"{CONTAINER_NAMES}::test_a_bad_engine_is_asked_once_however_many_containers_there_are",),
    ),
    mutation(
        "a container that nobody knows is asked for at each look",
        (
            "control/container_names.py",
            "self._answers[container] = _Answer(name, self._clock() + KEPT_S)",
            "if name:\n            self._answers[container] = _Answer(name, self._clock() + KEPT_S)",
        ),
        caught_by=(f"{CONTAINER_NAMES}::test_one_that_the_engine_does_not_know_is_asked_for_once_a_minute",),
    ),
)
