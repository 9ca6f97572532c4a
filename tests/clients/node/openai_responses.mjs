// Follows the configuration of docs/clients.md, which makes `client`. Prints what a scenario gave as JSON.
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "deepseek-flash";
const Color = z.object({ color: z.enum(["red", "blue"]) });
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", name: "weather", description: "Weather of a city", strict: false, parameters: city };
const color = { type: "object", properties: { color: { enum: ["red", "blue"] } }, required: ["color"] };
const paint = { type: "function", name: "paint", strict: false, parameters: color };
const ask = (input, options = {}) => client.responses.create({ model, input, ...options });
const user = (content) => ({ role: "user", content });
const reasoningOf = (output) => output.find((item) => item.type === "reasoning")?.content[0].text;

const results = (output) => output.filter((item) => item.type === "function_call").map((call) => ({
  type: "function_call_output", call_id: call.call_id, output: `sun in ${JSON.parse(call.arguments).city}`,
}));

const scenarios = {
  async chat() {
    const answer = await ask("Hello");
    return { text: answer.output_text, reasoning: reasoningOf(answer.output), tokens: answer.usage.total_tokens };
  },
  async stream() {
    const stream = client.responses.stream({ model, input: "Hello" });
    let text = "";
    stream.on("response.output_text.delta", (event) => (text += event.delta));
    const answer = await stream.finalResponse();
    return { text, reasoning: reasoningOf(answer.output), tokens: answer.usage.total_tokens };
  },
  // The client keeps the conversation.
  async tools() {
    const options = { tools: [weather], store: false, include: ["reasoning.encrypted_content"] };
    const input = [user("Weather in Oslo?")];
    const answers = [];
    for (const question of [null, null, user("And tomorrow?")]) {
      if (question) input.push(question);
      const answer = await ask(input, options);
      answers.push(answer.output_text);
      input.push(...answer.output, ...results(answer.output));
    }
    return { text: answers[1], later: answers[2] };
  },
  // The server keeps the conversation.
  async streamed_tools() {
    let input = [user("Weather in Oslo?")];
    let previous_response_id;
    for (;;) {
      const stream = client.responses.stream({ model, input, tools: [weather], previous_response_id });
      const answer = await stream.finalResponse();
      input = results(answer.output);
      previous_response_id = answer.id;
      if (!input.length) return { text: answer.output_text };
    }
  },
  async forced() {
    const given = [];
    for (const choice of ["required", { type: "function", name: "paint" }]) {
      const answer = await ask("A color", { tools: [paint], tool_choice: choice });
      const call = answer.output.find((item) => item.type === "function_call");
      given.push({ name: call.name, ...JSON.parse(call.arguments) });
    }
    return given;
  },
  async structured() {
    const answer = await client.responses.parse({ model, input: "A color", text: { format: zodTextFormat(Color, "color") } });
    return [answer.output_parsed];
  },
  async refused() {
    const error = await client.responses.create({ model: "none", input: "Hi" }).catch((e) => e);
    return { status: error.status, message: error.message };
  },
};
console.log(JSON.stringify(await scenarios[process.argv[2]]()));
