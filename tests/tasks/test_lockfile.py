from tasks.lockfile import sorted_lock

HEAD = "schema: '2.0'\nstages:\n"
A = "  a:\n    cmd: python a.py\n    outs:\n    - path: a\n      md5: 0cc175b9\n"
B1 = "  side@left:\n    cmd: x\n"
B2 = "  side@right:\n    cmd: 'y: z'\n"
OLD = "  zz_gone:\n    cmd: x\n"


def test_entries_stand_in_the_order_of_the_dag_and_are_not_changed() -> None:
    shuffled = HEAD + OLD + B2 + A + B1
    assert sorted_lock(shuffled, ["a", "side@left", "side@right"]) == HEAD + A + B1 + B2 + OLD
    assert sorted_lock(HEAD + A + B1, ["a", "side@left"]) == HEAD + A + B1


def test_a_file_without_stages_is_left_alone() -> None:
    assert sorted_lock("schema: '2.0'\n", ["a"]) == "schema: '2.0'\n"
