"""An agent of the package smolagents: its own loop, which writes its own prompts and rewrites its memory."""

from fiberpo_megatron.environments import Task


def solve(task: Task, base_url: str, api_key: str) -> float:
    """Let a CodeAgent work on a task for two steps; the reward is the parity of its answer's length."""
    from smolagents import CodeAgent, OpenAIServerModel
    from smolagents.agents import (
        FinalAnswerPromptTemplate,
        ManagedAgentPromptTemplate,
        PlanningPromptTemplate,
        PromptTemplates,
    )

    templates = PromptTemplates(
        system_prompt="solve the task by python code in {{code_block_opening_tag}}.",
        planning=PlanningPromptTemplate(initial_plan="", update_plan_pre_messages="", update_plan_post_messages=""),
        managed_agent=ManagedAgentPromptTemplate(task="", report=""),
        final_answer=FinalAnswerPromptTemplate(pre_messages="answer the task:", post_messages="answer {{task}}"),
    )
    model = OpenAIServerModel("policy", api_base=base_url, api_key=api_key, client_kwargs={"max_retries": 0})
    agent = CodeAgent([], model, prompt_templates=templates, max_steps=2, verbosity_level=0)
    return float(len(str(agent.run(str(task.prompt[-1]["content"])))) % 2)
