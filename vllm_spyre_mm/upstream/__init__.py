# SPDX-License-Identifier: Apache-2.0
"""What is leant on of vLLM: checked, marked as extended, and waited for while it loads."""
