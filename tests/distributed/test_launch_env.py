import pytest

from dist_prune.distributed.launch_env import LaunchEnv, expand_nodelist, find_launch_env

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[007-010],big3",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_torchruns_variables_win_over_slurms():
    assert find_launch_env(SRUN | TORCHRUN) == LaunchEnv(3, 4, 1, "tcp://10.0.0.1:29500", "torchrun")


def test_ipv6_master():
    assert find_launch_env(TORCHRUN | {"MASTER_ADDR": "fe80::1"}).address == "tcp://[fe80::1]:29500"


def test_slurm_step():
    assert find_launch_env(SRUN) == LaunchEnv(5, 8, 1, "tcp://gpu007:21234", "slurm")


def test_a_step_smaller_than_its_job():
    step = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu[009-010]"}
    place = find_launch_env(SRUN | step)
    assert (place.size, place.address.split(":")[1]) == (6, "//gpu009")
    assert place.address != find_launch_env(SRUN | step | {"SLURM_STEP_ID": "1"}).address


def test_submitit_on_one_machine():
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    place = find_launch_env(local | {"SUBMITIT_LOCAL_JOB_ID": "4321"} | without(SRUN, "SLURM_STEP_ID"))
    assert place == LaunchEnv(1, 2, 1, "tcp://127.0.0.1:24321", "submitit")


def test_a_given_master_address_overrides_slurms_nodelist():
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"}
    assert find_launch_env(SRUN | given).address == "tcp://127.0.0.1:4000"


def test_ports_of_neighbouring_jobs_and_steps_differ():
    places = [
        find_launch_env(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(99, 199)
        for step in range(4)
    ]
    assert len({place.address for place in places}) == len(places)


def test_torchrun_itself_is_told_from_variables_set_by_hand():
    assert not find_launch_env(TORCHRUN).has_launcher
    place = find_launch_env(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert (place.has_launcher, place.launcher_serves) == (True, False)
    place = find_launch_env(TORCHRUN | {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (place.has_launcher, place.launcher_serves) == (True, True)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        without(SRUN, "SLURM_STEP_ID"),  # an sbatch script
        without(SRUN, "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"),  # an salloc shell
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # a shell that salloc started as an interactive step
    ],
)
def test_without_srun_it_is_a_single_process(environ):
    assert find_launch_env(environ) == LaunchEnv(0, 1, 0, "", "single")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torchrun_variables_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is not set"):
        find_launch_env(without(TORCHRUN, name))


def test_a_bad_number_is_shown():
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        find_launch_env(TORCHRUN | {"WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-4,7],m03", ["n1", "n2", "n3", "n4", "n7", "m03"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("rack[1-2]-n[1-2].x", ["rack1-n1.x", "rack1-n2.x", "rack2-n1.x", "rack2-n2.x"]),
        ("a-1,b-[2,4-5]-ib", ["a-1", "b-2-ib", "b-4-ib", "b-5-ib"]),
    ],
)
def test_expand_nodelist(nodes, hosts):
    assert expand_nodelist(nodes) == hosts


@pytest.mark.parametrize("nodes", ["", "n[1-", "n[a-b]", "n1,,n2", "n]1["])
def test_malformed_nodelist(nodes):
    with pytest.raises(ValueError, match="node list"):
        expand_nodelist(nodes)
