"""What terms of an objective cost in a plan."""

from fiberpo_megatron.mcore import weight_gradient
from fiberpo_megatron.planning import activations
from tests.planning.test_estimate import plan


def test_a_reference_takes_host_memory_and_a_pass():
    without, kept = plan(), plan("--algorithm.kl.coefficient", "0.01")
    stage, parameters = kept.stages[0], kept.stages[0].states.parameters
    assert stage.host - without.stages[0].host == stage.reference == parameters > 0
    assert stage.total == without.stages[0].total  # none of it on the device
    assert without.time.reference == 0.0
    # a forward pass like that of the old log-probs, and the parameters four times over PCIe
    moved = kept.time.reference - kept.time.old_log_probs
    assert 4 * parameters / 64e9 < moved < 20 * parameters / 64e9
    served = plan("--algorithm.kl.coefficient", "0.01", "--algorithm.kl.servers", "http://127.0.0.1:1")
    assert served.time.reference == served.stages[0].reference == 0


def test_the_entropy_takes_a_chunk_of_logits():
    chunk = "--model.log_prob_chunk_tokens"
    without, bonus = (
        plan(chunk, "8192", "--algorithm.entropy.coefficient", value).stages[-1].log_probs for value in ("0", "0.01")
    )
    assert without <= bonus
    rows = 151936 // plan().config.parallel.tensor
    assert bonus >= 8192 * rows * 8


def test_slices_of_the_output_layers_gradient():
    assert activations.SLICE_BYTES == weight_gradient.SLICE_BYTES
