/* The library's entry: registers the operators, under settings, with the sessions that ask for it. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "matmul.h"
#include "registry.h"

/* ONNX Runtime never releases a registration, so it lives as long as the process; sessions with the same settings share
 * one. */
struct registration {
  struct pmpd_settings settings;
  struct pmpd_registered ops[PMPD_OP_COUNT];
  OrtCustomOpDomain *domain;
  struct registration *next;
  char session[]; /* settings.session */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct registration *registrations;

/* Make a registration, the first of the list. */
static OrtStatus *add_registration(const OrtApi *api, const char *session, int accuracy, uint32_t features) {
  struct registration *registration = calloc(1, sizeof *registration + strlen(session) + 1);
  if (!registration) return pmpd_no_memory(api);
  registration->settings = (struct pmpd_settings){
      .api = api,
      .session = strcpy(registration->session, session),
      .accuracy = accuracy,
      .features = features,
  };
  registration->next = registrations;
  OrtStatus *status = api->CreateCustomOpDomain("pmpd", &registration->domain);
  for (size_t i = 0; i < PMPD_OP_COUNT && !status; i++) {
    registration->ops[i] = pmpd_register(pmpd_ops[i], &registration->settings);
    status = api->CustomOpDomain_Add(registration->domain, &registration->ops[i].custom);
  }
  if (status) {
    if (registration->domain) api->ReleaseCustomOpDomain(registration->domain);
    free(registration);
  } else {
    registrations = registration;
  }
  return status;
}

/* Find or make the registration with these settings, and add it to the session's options. */
static OrtStatus *add_operators(OrtSessionOptions *options, const OrtApi *api, const char *session, int accuracy,
                                uint32_t features) {
  struct registration *registration = registrations;
  while (registration &&
         (registration->settings.accuracy != accuracy || registration->settings.features != features ||
          strcmp(registration->session, session)))
    registration = registration->next;
  if (!registration) {
    TRY(add_registration(api, session, accuracy, features));
    registration = registrations;
  }
  return api->AddCustomOpDomain(options, registration->domain);
}

/* Return an entry's value, or "", in memory that the caller frees. */
static OrtStatus *config_entry(const OrtApi *api, const OrtSessionOptions *options,
                                       const char *key, char **text) {
  int present;
  size_t size = 1;
  TRY(api->HasSessionConfigEntry(options, key, &present));
  if (present) TRY(api->GetSessionConfigEntry(options, key, NULL, &size));
  *text = calloc(size, 1);
  if (!*text) return pmpd_no_memory(api);
  OrtStatus *status = present ? api->GetSessionConfigEntry(options, key, *text, &size) : NULL;
  if (status) free(*text);
  return status;
}

static OrtStatus *unknown(const OrtApi *api, const char *what, const char *value, const char *choices) {
  char message[512];
  snprintf(message, sizeof message, "%s is '%.64s': choose one of %s", what, value, choices);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

static OrtStatus *unknown_level(const OrtApi *api) {
  char choices[256];
  size_t length = 0;
  for (int i = 0; i < pmpd_level_count; i++)
    length += (size_t)snprintf(choices + length, sizeof choices - length, "%s%s", i ? ", " : "", pmpd_levels[i].name);
  return unknown(api, "environment variable PMPD_MAX_ISA", getenv("PMPD_MAX_ISA"), choices);
}

static OrtStatus *read_accuracy(const OrtApi *api, const OrtSessionOptions *options,
                                        int *accuracy) {
  char *text;
  TRY(config_entry(api, options, "pmpd.accuracy", &text));
  *accuracy = strcmp(text, "int8") ? PMPD_EXACT : PMPD_INT8;
  OrtStatus *status = NULL;
  if (*accuracy == PMPD_EXACT && *text && strcmp(text, "exact"))
    status = unknown(api, "session config entry pmpd.accuracy", text, "exact, int8");
  free(text);
  return status;
}

/* ONNX Runtime calls this with the options of a session that registers the library. Two entries of the session's
 * configuration are settings: pmpd.accuracy, exact (the default) or int8, and pmpd.session, the tag of its reports. */
PMPD_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(PMPD_ORT_API_VERSION);
  if (!api) {
    char message[128];
    snprintf(message, sizeof message, "the pmpd operators need ONNX Runtime 1.%d or later, this is %.32s",
             PMPD_ORT_API_VERSION, base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message);
  }
  const int level = pmpd_highest_level();
  if (level < 0) return unknown_level(api);
  int accuracy;
  char *session;
  TRY(read_accuracy(api, options, &accuracy));
  TRY(config_entry(api, options, "pmpd.session", &session));
  pthread_mutex_lock(&lock);
  OrtStatus *status = add_operators(options, api, session, accuracy, pmpd_features(level));
  pthread_mutex_unlock(&lock);
  free(session);
  return status;
}
